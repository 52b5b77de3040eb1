//! Dropout's seed and step in memory: what is there when an op runs is what it draws, so that a
//! captured graph that runs again drops other elements.

use super::*;

type Tensor<'d> = crossfusion::device::Tensor<'d, f32>;

const ROWS: usize = 40;
const COLS: usize = 64;

fn tensor(device: &Device, seed: u64, rows: usize, cols: usize) -> Tensor<'_> {
    let values: Vec<f32> = random(seed, rows * cols).into_iter().map(|x| x as f32).collect();
    Tensor::from_slice(device, &values, rows, cols).unwrap()
}

/// The outputs of every op that drops.
fn outputs(device: &Arc<Device>, dropout: Option<Dropout>) -> Vec<Vec<f32>> {
    let workspace = &mut Workspace::new(device).unwrap();
    let zeros = |rows, cols| Tensor::zeros(device, rows, cols).unwrap();
    let x = tensor(device, 1, ROWS, COLS);
    let mut found = Vec::new();

    let (mut out, mut lse) = (zeros(ROWS, COLS), zeros(2, ROWS));
    let (q, k, v) = (x.mat(), x.mat(), x.mat());
    let attention = Attention { q, k, v, heads: 2, dropout, out: out.mat_mut(), lse: lse.mat_mut() };
    ops::attention(workspace, &mut [attention]).unwrap();
    let [mut dq, mut dk, mut dv] = [0; 3].map(|_| zeros(ROWS, COLS));
    let backward = AttentionBackward {
        q,
        k,
        v,
        heads: 2,
        dropout,
        out: out.mat(),
        lse: lse.mat(),
        dout: x.mat(),
        dq: dq.mat_mut(),
        dk: dk.mat_mut(),
        dv: dv.mat_mut(),
    };
    ops::attention_backward(workspace, &mut [backward]).unwrap();
    found.extend([out, dq, dk, dv].map(|tensor| tensor.to_vec().unwrap()));

    let (weight, bias, mut y) = (tensor(device, 2, COLS, COLS), tensor(device, 3, 1, COLS), zeros(ROWS, COLS));
    let (x, weight, bias) = (x.mat(), weight.mat(), Some(bias.mat()));
    let linear = Linear { x, weight, bias, gelu: None, dropout, residual: None, y: y.mat_mut() };
    ops::linear(workspace, &mut [linear]).unwrap();
    found.push(y.to_vec().unwrap());
    let mut dx = zeros(ROWS, COLS);
    let input =
        LinearBackwardInput { dy: x, weight, gelu: None, dropout, residual: None, accumulate: false, dx: dx.mat_mut() };
    ops::linear_backward_input(workspace, &mut [input]).unwrap();
    found.push(dx.to_vec().unwrap());

    let mut dropped = zeros(ROWS, COLS);
    let problem = GeluDropout { x, gelu: true, dropout, out: dropped.mat_mut() };
    ops::gelu_dropout(workspace, &mut [problem]).unwrap();
    found.push(dropped.to_vec().unwrap());

    let taps = [7, 5, 3, 1];
    let kernels = taps.map(|taps| tensor(device, 4, COLS / 2, 2 * taps));
    let biases = taps.map(|_| tensor(device, 5, 1, COLS / 2));
    let mut fused = zeros(ROWS, COLS / 2);
    let mut problem = ConvFusion {
        streams: &[x],
        mix: None,
        kernels: kernels.each_ref().map(|kernel| kernel.mat()),
        biases: biases.each_ref().map(|bias| bias.mat()),
        grid: TokenGrid::Sequence(ROWS),
        dropout,
        out: fused.mat_mut(),
    };
    ops::conv_fusion(workspace, &mut problem).unwrap();
    found.push(fused.to_vec().unwrap());
    found
}

fn draws_are_read_when_the_op_runs(device: Device) {
    let device = Arc::new(device);
    let of = |seed, step| Dropout::with_rate(Draw { seed, step }, 2, 0.4).unwrap().unwrap();
    let mut memory = Box::new([7, 3]);
    for [seed, step] in [[7, 3], [1 << 40, 4]] {
        *memory = [seed, step];
        // SAFETY: two aligned numbers that live to the end of this function.
        let read = unsafe { of(0, 0).with_draw_at(&raw const *memory) };
        let (read, given) = (outputs(&device, Some(read)), outputs(&device, Some(of(seed, step as u32))));
        assert_eq!(read, given);
        for (other, given) in outputs(&device, Some(of(0, 0))).iter().zip(&given) {
            assert_ne!(other, given, "another seed drops the same: this shows nothing");
        }
    }
}

#[test]
fn on_the_cpu() {
    draws_are_read_when_the_op_runs(Device::Cpu(Cpu::new(2).unwrap()));
}

#[cfg(feature = "emulator")]
#[test]
fn by_kernels() {
    draws_are_read_when_the_op_runs(Device::from_name("emulator", 0).unwrap());
}

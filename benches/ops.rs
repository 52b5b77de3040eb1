//! The CPU ops at the model's shapes: `cargo bench --bench ops`. Products stand beside the `gemm` crate's.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use crossfusion::{
    device::{Arena, Buffer, Device, View},
    ops::{
        Draw, Dropout,
        attention::{self, Attention, AttentionGrad},
        layer_norm::{self, Norm},
        matmul::{self, Epilogue, Matmul, WeightGrad},
        ppeg::{self, Ppeg},
    },
};

const D: usize = 512;
/// Tokens of a typical slide: 3,000 patches at 10x, padded to a square.
const N: usize = 3025;

fn device() -> Device {
    Device::from_name("cpu", 0).expect("a CPU")
}

/// `[rows, cols]` of small numbers.
fn matrix(device: &Device, keep: &mut Vec<Buffer>, rows: usize, cols: usize) -> View<f32> {
    let buffer = device.alloc(rows * cols * 4).expect("memory");
    let view = buffer.view(0, rows, cols);
    let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919) % 1021) as f32 / 1021.0 - 0.5).collect();
    device.upload(&values, view).expect("upload");
    keep.push(buffer);
    view
}

fn products(c: &mut Criterion) {
    let (device, keep) = (device(), &mut Vec::new());
    let mut arena = Arena::new(&device, 0).expect("memory");
    let mut group = c.benchmark_group("matmul");
    for (m, n, k) in [(N, D, D), (N, 2 * D, D), (N, D, 2 * D), (12000, D, 2048)] {
        let (x, w, y) = (matrix(&device, keep, m, k), matrix(&device, keep, n, k), matrix(&device, keep, m, n));
        let dw = matrix(&device, keep, n, k);
        let shape = format!("{m}x{n}x{k}");
        group.throughput(Throughput::Elements((2 * m * n * k) as u64));
        let forward = [Matmul { a: x, b: w, out: y, epilogue: Epilogue::default() }];
        group.bench_function(BenchmarkId::new("forward", &shape), |b| b.iter(|| matmul::forward(&device, &forward)));
        group.bench_function(BenchmarkId::new("gemm crate", &shape), |b| {
            b.iter(|| unsafe {
                let (n_, k_) = (n as isize, k as isize);
                let threads = gemm::Parallelism::Rayon(0);
                gemm::gemm(
                    m,
                    n,
                    k,
                    y.ptr(),
                    1,
                    n_,
                    false,
                    x.ptr(),
                    1,
                    k_,
                    w.ptr(),
                    k_,
                    1,
                    0f32,
                    1f32,
                    false,
                    false,
                    false,
                    threads,
                );
            })
        });
        let backward = [Matmul { a: y, b: w, out: x, epilogue: Epilogue::default() }];
        group.bench_function(BenchmarkId::new("backward input", &shape), |b| {
            b.iter(|| matmul::backward_input(&device, &backward))
        });
        let weight = [WeightGrad { dy: y, x, dw, db: None }];
        group.bench_function(BenchmarkId::new("backward weight", &shape), |b| {
            b.iter(|| matmul::backward_weight(&device, &mut arena, &weight))
        });
    }
}

fn attention(c: &mut Criterion) {
    let (device, keep) = (device(), &mut Vec::new());
    let mut arena = Arena::new(&device, 64 << 20).expect("memory");
    let mut group = c.benchmark_group("attention");
    for (n, m) in [(1024, 1024), (N, N)] {
        for rate in [0.0, 0.2] {
            let (q, k, v) = (matrix(&device, keep, n, D), matrix(&device, keep, m, D), matrix(&device, keep, m, D));
            let (out, lse) = (matrix(&device, keep, n, D), matrix(&device, keep, 4, n));
            let dropout = Dropout::new(Some(Draw { seed: 1, step: 1 }), 0, rate);
            let problem = Attention { q, k, v, out, lse, heads: 4, dropout };
            let shape = format!("{n}x{m}, dropout {rate}");
            group.throughput(Throughput::Elements((4 * n * m * D) as u64));
            group.bench_function(BenchmarkId::new("forward", &shape), |b| {
                b.iter(|| attention::forward(&device, &mut arena, &[problem]))
            });
            let (dout, dq) = (matrix(&device, keep, n, D), matrix(&device, keep, n, D));
            let (dk, dv) = (matrix(&device, keep, m, D), matrix(&device, keep, m, D));
            let grad = [AttentionGrad { forward: problem, dout, dq, dk, dv }];
            group.throughput(Throughput::Elements((10 * n * m * D) as u64));
            group.bench_function(BenchmarkId::new("backward", &shape), |b| {
                b.iter(|| attention::backward(&device, &mut arena, &grad))
            });
        }
    }
}

fn rowwise(c: &mut Criterion) {
    let (device, keep) = (device(), &mut Vec::new());
    let mut arena = Arena::new(&device, 1 << 20).expect("memory");
    let (x, y, stats) = (matrix(&device, keep, N, D), matrix(&device, keep, N, D), matrix(&device, keep, N, 2));
    let (weight, bias) = (matrix(&device, keep, 1, D), matrix(&device, keep, 1, D));
    let norm = [Norm { x, stats, weight, bias, y }];
    c.bench_function("layer_norm/forward", |b| b.iter(|| layer_norm::forward(&device, black_box(&norm))));
    let kernels = ppeg::SIDES.map(|side| matrix(&device, keep, D, side * side));
    let problem = [Ppeg { x, y, side: 55, kernels, biases: [bias; 3] }];
    c.bench_function("ppeg/forward", |b| b.iter(|| ppeg::forward(&device, &mut arena, &problem)));
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(std::time::Duration::from_secs(2));
    targets = products, attention, rowwise
}
criterion_main!(benches);

//! The ops of a training step on the CPU, each alone (`cf-bench op` gives the same cases against
//! the machine's ceilings); and the `gemm` crate on the same products, as a peer: `cargo bench
//! --bench ops`, or `-- "matmul forward"`.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use crossfusion::{
    bench::cases::{Cases, Operand, Product},
    device::Device,
};

const BAGS: [usize; 3] = [800, 3000, 12000];

fn ops(c: &mut Criterion) {
    let device = Device::from_name("cpu", 0).expect("a CPU");
    let mut cases = Cases::new::<f32>(&device, BAGS.into(), 2048, 24_500_000).expect("cases");
    for i in 0..cases.cases().len() {
        let case = &cases.cases()[i];
        let mut group = c.benchmark_group(case.op);
        let (work, shape) = (if case.flop > 0.0 { case.flop } else { case.bytes }, case.shape.clone());
        group.throughput(Throughput::Elements(work as u64));
        group.bench_function(BenchmarkId::new("ours", shape), |b| b.iter(|| cases.run(i)));
        let case = &cases.cases()[i];
        if !case.products.is_empty() {
            group.bench_function(BenchmarkId::new("gemm crate", &case.shape), |b| {
                b.iter(|| case.products.iter().for_each(gemm_crate))
            });
        }
    }
}

fn gemm_crate(p: &Product) {
    let (out, a, b) = (p.out, p.a, p.b);
    // (column stride, row stride)
    let strides = |m: Operand| if m.transposed { (m.stride as isize, 1) } else { (1, m.stride as isize) };
    let (a_strides, b_strides) = (strides(a), strides(b));
    // SAFETY: the cases' matrices, which are alive, and which nothing else uses now.
    unsafe {
        gemm::gemm(
            out.rows,
            out.cols,
            p.depth,
            out.address as *mut f32,
            1,
            out.stride as isize,
            false,
            a.address as *const f32,
            a_strides.0,
            a_strides.1,
            b.address as *const f32,
            b_strides.0,
            b_strides.1,
            0f32,
            1f32,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        );
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(std::time::Duration::from_secs(2));
    targets = ops
}
criterion_main!(benches);

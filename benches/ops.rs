//! The ops of a training step on the CPU, each alone (`cf-bench op` gives the same cases against the machine's ceilings); and the
//! `gemm` crate on the same products, as a peer: `cargo bench --bench ops`, or `-- "matmul forward"`.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use crossfusion::{
    bench::cases::{self, Product},
    device::{Arena, Device},
};

const BAGS: [usize; 3] = [800, 3000, 12000];

fn ops(c: &mut Criterion) {
    let device = Device::from_name("cpu", 0).expect("a CPU");
    let mut arena = Arena::new(&device, cases::ARENA).expect("memory");
    let mut keep = Vec::new();
    let cases = cases::cases::<f32>(&device, BAGS.into(), 2048, 24_500_000, &mut keep).expect("cases");
    for case in &cases {
        let mut group = c.benchmark_group(case.op);
        let work = if case.flop > 0.0 { case.flop } else { case.bytes };
        group.throughput(Throughput::Elements(work as u64));
        group.bench_function(BenchmarkId::new("ours", &case.shape), |b| b.iter(|| case.run(&device, &mut arena)));
        if !case.products.is_empty() {
            group.bench_function(BenchmarkId::new("gemm crate", &case.shape), |b| {
                b.iter(|| case.products.iter().for_each(gemm_crate))
            });
        }
    }
}

fn gemm_crate(p: &Product) {
    let (out, a, b) = (p.out.matrix, p.a.matrix, p.b.matrix);
    // (column stride, row stride)
    let strides = |stride: u64, transposed: bool| if transposed { (stride as isize, 1) } else { (1, stride as isize) };
    let (a_strides, b_strides) = (strides(a.stride, p.a.transposed), strides(b.stride, p.b.transposed));
    // SAFETY: the cases' matrices, alive as long as `keep`.
    unsafe {
        gemm::gemm(
            out.rows as usize,
            out.cols as usize,
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

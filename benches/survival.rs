//! Cox likelihood and gradient, and the C-index. `CROSSFUSION_BENCH_N=1000000 cargo bench --bench
//! survival` for the cohort size at which they are compared with other software.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use crossfusion::survival::{CoxCohort, Ties, concordance_index};

/// Uniform numbers in 0..1 (splitmix64).
fn uniform(i: u64, stream: u64) -> f64 {
    let mut z = (i + 1 + (stream << 40)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (z ^ (z >> 31)) as f64 / u64::MAX as f64
}

fn survival(c: &mut Criterion) {
    let n: usize = std::env::var("CROSSFUSION_BENCH_N").ok().and_then(|n| n.parse().ok()).unwrap_or(10_000);
    let rows = || 0..n as u64;
    let event: Vec<bool> = rows().map(|i| uniform(i, 1) < 0.5).collect();
    let risk: Vec<f32> = rows().map(|i| 4.0 * uniform(i, 2) as f32 - 2.0).collect();
    let continuous: Vec<f64> = rows().map(|i| -uniform(i, 0).ln() * 1000.0).collect();
    let days: Vec<f64> = continuous.iter().map(|t| t.ceil()).collect();
    let mut gradient = vec![0.0f32; n];

    let mut group = c.benchmark_group("survival");
    group.throughput(Throughput::Elements(n as u64));
    for (name, time) in [("continuous", &continuous), ("days", &days)] {
        group.bench_function(format!("cox efron {name} unsorted"), |b| {
            b.iter(|| {
                let cohort = CoxCohort::new(time, &event, None, None).unwrap();
                cohort.loglik_and_gradient(&risk, Ties::Efron, black_box(&mut gradient)).unwrap()
            })
        });
        let mut sorted = time.clone();
        sorted.sort_by(f64::total_cmp);
        group.bench_function(format!("cox efron {name} presorted"), |b| {
            b.iter(|| {
                let cohort = CoxCohort::presorted(&sorted, &event, None, None).unwrap();
                cohort.loglik_and_gradient(&risk, Ties::Efron, black_box(&mut gradient)).unwrap()
            })
        });
        let cohort = CoxCohort::new(time, &event, None, None).unwrap();
        group.bench_function(format!("cox efron {name} new risks of a sorted cohort"), |b| {
            b.iter(|| cohort.loglik_and_gradient(&risk, Ties::Efron, black_box(&mut gradient)).unwrap())
        });
    }
    let risk: Vec<f64> = risk.iter().map(|&r| f64::from(r)).collect();
    group.bench_function("concordance index", |b| b.iter(|| concordance_index(&continuous, &event, &risk).unwrap()));
    group.finish();
}

criterion_group!(benches, survival);
criterion_main!(benches);

//! kernels/probes.cu: fragment layouts against CuTe's tables, arithmetic against half's, seeded
//! bugs against the detectors.

use crossfusion::{
    device::{
        Arg, Launch, Storage,
        emulator::{Options, Schedule, kernels},
    },
    ops::{Draw, Dropout, dropout::KernelDropout},
};
use half::bf16;

use super::{
    Guarded, PLAIN, RACE,
    common::{Law, fill},
    gpu, launch,
};

fn probe(kernel: &'static str, blocks: u32, threads: u32, shared_bytes: u32, args: Vec<Arg>) -> Launch {
    Launch { kernel, storage: Storage::F32, grid: [blocks, 1, 1], block: [threads, 1, 1], shared_bytes, args }
}

fn noise(name: &str, len: usize) -> Vec<f32> {
    fill(name, len, Law { offset: 0.0, scale: 2.0 })
}

/// CuTe's layouts as mixed radices: lane (l % 4, l / 4) and value bits to a column-major index.
fn layout(lane: usize, value: usize, lane_strides: [usize; 2], value_strides: &[usize]) -> usize {
    let values: usize = value_strides.iter().enumerate().map(|(bit, stride)| (value >> bit & 1) * stride).sum();
    lane % 4 * lane_strides[0] + lane / 4 * lane_strides[1] + values
}

/// cutlass/include/cute/atom/mma_traits_sm80.hpp, SM80_16x8x16_F32BF16BF16F32_TN and
/// SM80_16x8x8_F32TF32TF32F32_TN.
#[test]
fn mma_fragments() {
    for tf32 in [false, true] {
        let (k, per_register) = if tf32 { (8, 1) } else { (16, 2) };
        // (bits in a register, the value that they stand for)
        let encode = |x: f32| match tf32 {
            false => (u32::from(bf16::from_f32(x).to_bits()), bf16::from_f32(x).to_f32()),
            true => (x.to_bits(), f32::from_bits(x.to_bits() & 0xffff_e000)),
        };
        let (a, b, c) = (noise("a", 16 * k), noise("b", 8 * k), noise("c", 128));
        let (mut ra, mut rb, mut rd) = ([0u32; 128], [0u32; 64], [0f32; 128]);
        for lane in 0..32 {
            for v in 0..4 * per_register {
                let i = if tf32 { layout(lane, v, [16, 1], &[8, 64]) } else { layout(lane, v, [32, 1], &[16, 8, 128]) };
                ra[lane * 4 + v / per_register] |= encode(a[i]).0 << (v % per_register * 16);
            }
            for v in 0..2 * per_register {
                let i = if tf32 { layout(lane, v, [8, 1], &[32]) } else { layout(lane, v, [16, 1], &[8, 64]) };
                rb[lane * 2 + v / per_register] |= encode(b[i]).0 << (v % per_register * 16);
            }
            for v in 0..4 {
                rd[lane * 4 + v] = c[layout(lane, v, [32, 1], &[16, 8])];
            }
        }
        let (ra, rb, rd) = (Guarded::new(&ra).unwrap(), Guarded::new(&rb).unwrap(), Guarded::new(&rd).unwrap());
        let args = vec![Arg::new(ra.address()), Arg::new(rb.address()), Arg::new(rd.address())];
        let kernel = if tf32 { "probe_mma_tf32" } else { "probe_mma_bf16" };
        let stats = launch(&probe(kernel, 1, 32, 0, args), RACE).unwrap();
        assert!(gpu().is_some() || stats.mma == 1);
        let d = rd.read().unwrap();
        for lane in 0..32 {
            for v in 0..4 {
                let i = layout(lane, v, [32, 1], &[16, 8]);
                let (m, n) = (i % 16, i / 16);
                let product = |j| f64::from(encode(a[m + 16 * j]).1) * f64::from(encode(b[n + 8 * j]).1);
                let truth = f64::from(c[i]) + (0..k).map(product).sum::<f64>();
                assert!((f64::from(d[lane * 4 + v]) - truth).abs() < 2e-5, "tf32 {tf32}, row {m}, column {n}");
            }
        }
    }
}

/// copy_traits_sm75.hpp, SM75_U32x4_LDSM_N and SM75_U16x8_LDSM_T: (lane, register, half) to an
/// element of 32 rows of 8.
#[test]
fn ldmatrix_fragments() {
    for trans in [false, true] {
        let rows: Vec<u16> = (0..256).map(|i| i * 7 + 1).collect();
        let (input, output) = (Guarded::new(&rows).unwrap(), Guarded::<u32>::unset(128).unwrap());
        let kernel = if trans { "probe_ldmatrix_trans" } else { "probe_ldmatrix" };
        let args = vec![Arg::new(input.address()), Arg::new(output.address())];
        let stats = launch(&probe(kernel, 1, 32, 512, args), RACE).unwrap();
        assert!(gpu().is_some() || (stats.ldmatrix, stats.ldmatrix_conflicts) == (1, 0));
        for (i, register) in output.read().unwrap().into_iter().enumerate() {
            let (lane, j) = (i / 4, i % 4);
            for half in 0..2 {
                let bit = if trans {
                    lane % 4 * 256 + lane / 4 * 16 + half * 128 + j * 1024
                } else {
                    lane * 32 + half * 16 + j * 1024
                };
                assert_eq!(
                    (register >> (16 * half)) as u16,
                    rows[bit / 16],
                    "trans {trans}, lane {lane}, register {j}"
                );
            }
        }
    }
}

/// Whether the tests' device has Hopper's wgmma.
fn has_wgmma() -> bool {
    gpu().is_none_or(|gpu| gpu.has_wgmma())
}

/// One wgmma from shared memory: bytes of the descriptors of a and b, each start, leading, stride.
#[derive(Clone, Copy)]
struct Places {
    a: [u32; 3],
    b: [u32; 3],
}

/// The canonical layouts of mma_traits_sm90_gmma.hpp for B128, in bytes; Swizzle<3,4,3> is the last
/// line's.
fn canonical(mn_major: bool, [start, leading, stride]: [u32; 3], i: usize, k: usize) -> usize {
    let (leading, stride) = (leading as usize, stride as usize);
    let offset = start as usize
        + match mn_major {
            false => i % 8 * 128 + i / 8 * stride + k * 2,
            true => i % 64 * 2 + i / 64 * leading + k % 8 * 128 + k / 8 * stride,
        };
    offset ^ (offset >> 7 & 7) << 4
}

/// CLayout_64xN and ALayout_64x16 of the same file: thread and value to m + 64 n, or m + 64 k.
fn warpgroup_layout(thread: usize, value: usize) -> usize {
    layout(thread % 32, value, [128, 1], &[64, 8, 512, 1024, 2048, 4096]) + thread / 32 * 16
}

#[test]
fn wgmma_layouts() {
    if !has_wgmma() {
        return;
    }
    let bits = |values: &[f32]| values.iter().map(|&x| bf16::from_f32(x).to_bits()).collect::<Vec<_>>();
    let words = |halves: &[u16]| halves.chunks(2).map(|h| u32::from(h[0]) | u32::from(h[1]) << 16).collect::<Vec<_>>();
    // the second and the fourth slice of 16 in k; lines farther apart than they need be
    let kk = Places { a: [32, 16, 2048], b: [96, 16, 1024] };
    let kn = Places { a: [64, 16, 1024], b: [2048, 8192, 1024] };
    let mn = Places { a: [1024, 16, 4096], b: [0, 4096, 8192] };
    let registers = Places { a: [0; 3], b: [4096, 2048, 1024] };
    for (kernel, [a_mn, b_mn], places) in [
        ("probe_wgmma", [false, false], kk),
        ("probe_wgmma_b_mn", [false, true], kn),
        ("probe_wgmma_both_mn", [true, true], mn),
        ("probe_wgmma_registers", [false, true], registers),
    ] {
        let (a, b, c) = (bits(&noise("a", 8192)), bits(&noise("b", 8192)), noise("c", 64 * 128));
        let mut d = vec![0f32; 64 * 128];
        (0..128 * 64).for_each(|i| d[i] = c[warpgroup_layout(i / 64, i % 64)]);
        let [da, db] = [&a, &b].map(|halves| Guarded::new(&words(halves)).unwrap());
        let d = Guarded::new(&d).unwrap();
        let mut args = vec![Arg::new(da.address()), Arg::new(db.address()), Arg::new(d.address())];
        args.push(Arg::new([places.a, places.b]));
        let stats = launch(&probe(kernel, 1, 128, 32 << 10, args), RACE).unwrap();
        assert!(gpu().is_some() || stats.mma == 4 * 16);
        let got = d.read().unwrap();
        let mut from_registers = [0; 64 * 16];
        (0..128 * 8).for_each(|i| from_registers[warpgroup_layout(i / 8, i % 8)] = i);
        let element = |halves: &[u16], i: usize| f64::from(bf16::from_bits(halves[i]));
        let of_a = |m: usize, k: usize| match kernel {
            "probe_wgmma_registers" => element(&a, from_registers[m + 64 * k]),
            _ => element(&a, canonical(a_mn, places.a, m, k) / 2),
        };
        let of_b = |n, k| element(&b, canonical(b_mn, places.b, n, k) / 2);
        for (i, &got) in got.iter().enumerate() {
            let at = warpgroup_layout(i / 64, i % 64);
            let (m, n) = (at % 64, at / 64);
            let truth = f64::from(c[at]) + (0..16).map(|k| of_a(m, k) * of_b(n, k)).sum::<f64>();
            assert!((f64::from(got) - truth).abs() < 4e-5, "{kernel}: row {m}, column {n}: {got} for {truth}");
        }
    }
}

#[test]
fn conversions() {
    let mut x = noise("x", 1000);
    x.extend([0.0, -0.0, 1.0, f32::INFINITY, f32::MAX, 1e-40, 1.003_906_3, 1.011_718_8, -126.0, 127.0]);
    let n = x.len();
    let input = Guarded::new(&x).unwrap();
    let (halves, tf32, exp2) =
        (Guarded::<u32>::unset(n).unwrap(), Guarded::<u32>::unset(n).unwrap(), Guarded::<f32>::unset(n).unwrap());
    let mut args: Vec<_> = [input.address(), halves.address(), tf32.address(), exp2.address()].map(Arg::new).into();
    args.push(Arg::new(n as i32));
    launch(&probe("probe_convert", n.div_ceil(256) as u32, 256, 0, args), RACE).unwrap();
    let (halves, tf32, exp2) = (halves.read().unwrap(), tf32.read().unwrap(), exp2.read().unwrap());
    for (i, &x) in x.iter().enumerate() {
        let pair = u32::from(bf16::from_f32(x).to_bits()) | u32::from(bf16::from_f32(-x).to_bits()) << 16;
        assert_eq!(halves[i], pair, "bf16 of {x}");
        if x.is_finite() && x != f32::MAX {
            let rounded = f32::from_bits(tf32[i]);
            assert!(tf32[i] & 0x1fff == 0 && (rounded - x).abs() <= x.abs() / 2048.0 + 1e-38, "tf32 of {x}");
            assert!((exp2[i] - x.exp2()).abs() <= 3e-7 * x.exp2(), "2^{x}");
        }
    }
}

/// What one probe did: its error, or its output.
fn attempt<T: bytemuck::Pod>(
    kernel: &'static str,
    shape: (u32, u32, u32),
    input: Option<&[f32]>,
    output: &[T],
    n: i32,
    options: Options,
) -> Result<Vec<T>, String> {
    let input = input.map(|data| Guarded::new(data).unwrap());
    let output = Guarded::new(output).unwrap();
    let mut args: Vec<_> = input.iter().map(|m| Arg::new(m.address())).collect();
    args.extend([Arg::new(output.address()), Arg::new(n)]);
    let (blocks, threads, shared) = shape;
    launch(&probe(kernel, blocks, threads, shared, args), options).map_err(|e| e.to_string())?;
    output.read().map_err(|e| e.to_string())
}

/// The sound kernel gives `truth` under every schedule and in race mode; race mode reports every
/// bug, in these words and with the line; and some schedule of plain mode sees those of `seen`.
fn detects<T: bytemuck::Pod + PartialEq + std::fmt::Debug>(
    run: impl Fn(&'static str, Options) -> Result<Vec<T>, String>,
    sound: &'static str,
    truth: &[T],
    bugs: &[(&'static str, &str, bool)],
) {
    for options in PLAIN.into_iter().chain([RACE]) {
        assert_eq!(run(sound, options).as_deref(), Ok(truth), "{sound} {options:?}");
    }
    if gpu().is_some() {
        return; // a bug may do anything there
    }
    for &(bug, words, seen) in bugs {
        let message = run(bug, RACE).expect_err(bug);
        assert!(message.contains(words), "{bug}: {message}");
        assert!(message.contains(bug) && message.contains("kernels/probes.cu:"), "{bug}: {message}");
        let noticed = PLAIN.into_iter().any(|options| run(bug, options).as_deref() != Ok(truth));
        assert!(noticed || !seen, "{bug} in plain mode"); // the others may show too, by the machine's own races
    }
}

#[test]
fn missing_barriers() {
    let input: Vec<f32> = (0..1000).map(|i| (i * 7 % 17 - 8) as f32).collect();
    let total = input.iter().map(|x| x + x * x).sum::<f32>();
    let first = input[..64].iter().sum::<f32>();
    detects(
        |kernel, options| attempt(kernel, (1, 256, 0), Some(&input), &[0f32; 2], 1000, options),
        "probe_sum",
        &[total, first],
        &[
            ("probe_sum_bug1", "nobody wrote", true),
            ("probe_sum_bug2", "RACE", true),
            ("probe_sum_bug3", "RACE", true),
            ("probe_sum_bug4", "divergent barrier", true),
            ("probe_sum_bug5", "not in its own mask", true),
        ],
    );
}

#[test]
fn asynchronous_copies_and_bounds() {
    let input = noise("in", 128);
    let truth: Vec<f32> = (0..128).map(|i| input[i / 64 * 64 + 63 - i % 64]).collect();
    detects(
        |kernel, options| {
            let n = if kernel.ends_with("bug5") { 100 } else { 128 };
            attempt(kernel, (2, 64, 256), Some(&input[..n]), &vec![0f32; n], n as i32, options)
        },
        "probe_reverse",
        &truth,
        &[
            ("probe_reverse_bug1", "cp.async is still writing", true),
            ("probe_reverse_bug2", "read of shared memory", true),
            ("probe_reverse_bug3", "nobody wrote", true),
            ("probe_reverse_bug4", "outside every shared array", true),
            ("probe_reverse_bug5", "outside every buffer", true),
            ("probe_reverse_bug6", "aligned", true),
            ("probe_reverse_bug7", "has not waited", true),
        ],
    );
}

#[test]
fn named_barriers() {
    let input = noise("in", 320);
    let truth: Vec<f32> = (0..320).map(|i| input[i / 32 * 32 + 31 - i % 32]).collect();
    detects(
        |kernel, options| attempt(kernel, (1, 64, 0), Some(&input), &[0f32; 320], 10, options),
        "probe_handoff",
        &truth,
        &[("probe_handoff_bug1", "RACE", true), ("probe_handoff_bug2", "deadlock", true)],
    );
}

#[test]
fn asynchronous_products() {
    if !has_wgmma() {
        return;
    }
    // whole numbers: every sum is exact
    let images: Vec<u16> = (0..4 * 8192).map(|i| bf16::from_f32((i * 7 % 11) as f32 - 5.0).to_bits()).collect();
    let input: Vec<f32> = images.chunks(2).map(|h| f32::from_bits(u32::from(h[0]) | u32::from(h[1]) << 16)).collect();
    let x = |image: usize, i, k| {
        let at = canonical(false, [0, 16, 1024], i, k) / 2;
        bf16::from_bits(images[image * 8192 + at]).to_f32()
    };
    let sum = |i: usize| {
        let at = warpgroup_layout(i / 64, i % 64);
        (0..64).map(|ik| x(ik / 16, at % 64, ik % 16) * x(ik / 16, at / 64, ik % 16)).sum::<f32>()
    };
    let truth: Vec<f32> = (0..128 * 64).map(sum).collect();
    detects(
        |kernel, options| attempt(kernel, (1, 128, 16 << 10), Some(&input), &[0f32; 128 * 64], 4, options),
        "probe_wgmma_stream",
        &truth,
        &[
            ("probe_wgmma_stream_bug1", "without a fence.proxy.async", false),
            ("probe_wgmma_stream_bug2", "without a wgmma.fence", true),
            ("probe_wgmma_stream_bug3", "that a wgmma is still reading", true),
            ("probe_wgmma_stream_bug4", "RACE", true),
            ("probe_wgmma_stream_bug5", "has not waited for its wgmma", true),
        ],
    );
}

#[test]
fn atomics() {
    let bits = (0..100u32).map(u32::count_ones).sum::<u32>() as i32;
    detects(
        |kernel, options| attempt(kernel, (2, 64, 0), None, &[0i32; 2], 100, options),
        "probe_count",
        &[100, bits],
        &[("probe_count_bug1", "RACE", false)],
    );
}

/// Whether to skip what only the emulator does.
fn skips_the_emulators_own() -> bool {
    gpu().is_some()
}

#[test]
fn refused_launches() {
    if skips_the_emulators_own() {
        return;
    }
    let refusal = |launch_: Launch| launch(&launch_, PLAIN[0]).unwrap_err().to_string();
    let args = || vec![Arg::new(0u64), Arg::new(0i32)];
    assert!(refusal(probe("no_such", 1, 32, 0, args())).ends_with("no_such_f32: there is no such kernel"));
    assert!(refusal(probe("probe_count", 1, 65, 0, args())).ends_with("a block of 65 threads, the kernel allows 64"));
    assert!(refusal(probe("probe_count", 1, 64, 0, vec![])).ends_with("0 arguments, the kernel takes 2"));
    let swapped = vec![Arg::new(0i32), Arg::new(0u64)];
    assert!(refusal(probe("probe_count", 1, 64, 0, swapped)).contains("argument 0 has 4 bytes"));
    let needs = refusal(probe("probe_ldmatrix", 1, 32, 511, vec![Arg::new(0u64), Arg::new(0u64)]));
    assert!(needs.contains("shared arrays need 512 bytes, the launch gives 511"), "{needs}");
}

#[test]
fn kernels_come_in_both_storage_types() {
    if skips_the_emulators_own() {
        return;
    }
    let names = kernels().unwrap();
    for kernel in names.iter().filter_map(|n| n.strip_suffix("_f32")) {
        assert!(names.contains(&format!("{kernel}_bf16")), "{kernel}");
    }
    assert!(names.iter().any(|n| n == "layer_norm_forward_bf16"));
}

/// Two host threads at once: each gets its own error.
#[test]
fn errors_are_per_launch() {
    if skips_the_emulators_own() {
        return;
    }
    std::thread::scope(|scope| {
        for (kernel, words) in [("probe_sum_bug4", "divergent"), ("probe_sum_bug5", "own mask")] {
            scope.spawn(move || {
                for seed in 0..20 {
                    let options = Options { schedule: Schedule::Skewed, seed, race: seed % 2 == 0 };
                    let message = attempt(kernel, (1, 256, 0), Some(&[1.0; 64]), &[0f32; 2], 64, options).unwrap_err();
                    assert!(message.contains(words) && message.contains(kernel), "{message}");
                }
            });
        }
    });
}

/// The three functions of kernels/dropout.cuh draw, bit for bit, what src/ops/dropout.rs draws.
#[test]
fn dropout_is_the_cpu_s() {
    let (rows, cols) = (3, 512);
    let draws = [Draw { seed: 1, step: 0 }, Draw { seed: 0xdead_beef_0123_4567, step: u32::MAX }];
    for (i, rate) in [0.1, 0.3, 0.5, 0.95].into_iter().enumerate() {
        let dropout = Dropout::new(Some(draws[i % 2]), [0, 7, 1 << 20][i % 3], rate).unwrap();
        for first in [0, 40_000] {
            let outs = [(); 3].map(|()| Guarded::<f32>::unset(rows * cols).unwrap());
            let mut args = vec![Arg::new(KernelDropout::from(Some(dropout))), Arg::new(first), Arg::new(cols as i32)];
            args.extend(outs.iter().map(|out| Arg::new(out.address())));
            launch(&probe("probe_dropout", rows as u32, 32, 0, args), RACE).unwrap();
            let mut expected = vec![1.0f32; rows * cols];
            for (row, factors) in expected.chunks_mut(cols).enumerate() {
                dropout.apply(first as usize + row, factors);
            }
            assert!(expected.contains(&0.0) && expected.iter().any(|&x| x > 1.0));
            for (name, out) in ["fragment", "eight", "factor"].iter().zip(&outs) {
                assert!(out.read().unwrap() == expected, "{name}: rate {rate}, rows from {first}");
            }
        }
    }
}

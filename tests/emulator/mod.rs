//! The CUDA kernels on the emulator: the instructions that they use, the emulator's detectors, each
//! op against its CPU twin. They are a part of the crate's unit tests (src/lib.rs), since ops over
//! views are not public. With CROSSFUSION_DEVICE=cuda the same launches run on a GPU, where a
//! schedule is the hardware's own and nothing looks for races.

mod attention;
mod bed;
#[path = "../common/mod.rs"]
mod common;
mod conv_fusion;
mod cox;
mod elementwise;
mod head;
mod layer_norm;
mod matmul;
mod ppeg;
mod probes;

use std::sync::OnceLock;

use bytemuck::Pod;
use crossfusion::{
    Result,
    device::{
        Buffer, Device, Launch, Matrix, Stored,
        emulator::{self, Options, Schedule, Stats},
    },
};
use half::bf16;

/// Plain runs that together cover the schedules and some chance.
const PLAIN: [Options; 5] = [
    Options { schedule: Schedule::Ordered, seed: 1, race: false },
    Options { schedule: Schedule::Random, seed: 1, race: false },
    Options { schedule: Schedule::Random, seed: 2, race: false },
    Options { schedule: Schedule::Skewed, seed: 1, race: false },
    Options { schedule: Schedule::Skewed, seed: 2, race: false },
];
const RACE: Options = Options { schedule: Schedule::Skewed, seed: 1, race: true };

/// The GPU, if the tests shall run on it.
fn gpu() -> Option<&'static Device> {
    static GPU: OnceLock<Option<Device>> = OnceLock::new();
    let open = || {
        let wanted = std::env::var("CROSSFUSION_DEVICE").is_ok_and(|name| name == "cuda");
        wanted.then(|| Device::from_name("cuda", 0).unwrap_or_else(|e| panic!("{e}")))
    };
    GPU.get_or_init(open).as_ref()
}

/// Runs a kernel to its end, on the GPU if there is one to be used. `options` and the statistics
/// are the emulator's.
fn launch(launch: &Launch, options: Options) -> Result<Stats> {
    let Some(gpu) = gpu() else { return emulator::launch(launch, options) };
    gpu.launch([launch.clone()])?;
    gpu.synchronize()?;
    Ok(Stats::default())
}

/// Memory that kernels may touch, to the byte.
enum Guarded<T> {
    Emulator(emulator::Guarded<T>),
    /// A guard, `len` elements, a guard.
    Gpu {
        buffer: Buffer,
        len: usize,
    },
}

const GUARD: usize = 256;

impl<T: Pod> Guarded<T> {
    fn new(data: &[T]) -> Result<Self> {
        let Some(gpu) = gpu() else { return emulator::Guarded::new(data).map(Self::Emulator) };
        let bytes = [&[0xff; GUARD], bytemuck::cast_slice(data), &[0xff; GUARD]].concat();
        let buffer = gpu.alloc(bytes.len())?;
        gpu.write(&bytes, &buffer)?;
        Ok(Self::Gpu { buffer, len: data.len() })
    }

    /// All bits set, which is NaN in every type: to be written by a kernel.
    fn unset(len: usize) -> Result<Self> {
        let mut data = vec![T::zeroed(); len];
        bytemuck::cast_slice_mut::<T, u8>(&mut data).fill(0xff);
        Self::new(&data)
    }

    fn address(&self) -> u64 {
        match self {
            Self::Emulator(memory) => memory.address(),
            Self::Gpu { buffer, .. } => buffer.address() + GUARD as u64,
        }
    }

    /// The elements as a contiguous matrix.
    fn matrix(&self, rows: usize, cols: usize) -> Matrix {
        Matrix::new(self.address(), rows, cols)
    }

    /// The elements, unless something was written around them.
    fn read(&self) -> Result<Vec<T>> {
        match self {
            Self::Emulator(memory) => memory.read(),
            Self::Gpu { buffer, len } => {
                let bytes = gpu().unwrap().read(buffer)?;
                let (guard, rest) = bytes.split_at(GUARD);
                let (data, end) = rest.split_at(len * size_of::<T>());
                assert!(
                    guard.iter().chain(end).all(|&b| b == 0xff),
                    "a kernel wrote outside a buffer of {len} elements"
                );
                Ok(data.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect())
            }
        }
    }
}

/// An element of a kernel's storage.
trait Element: Stored + PartialEq + std::fmt::Debug {
    fn of(x: f32) -> Self;
    fn f32(self) -> f32;
}
impl Element for f32 {
    fn of(x: f32) -> Self {
        x
    }
    fn f32(self) -> f32 {
        self
    }
}
impl Element for bf16 {
    fn of(x: f32) -> Self {
        bf16::from_f32(x)
    }
    fn f32(self) -> f32 {
        self.to_f32()
    }
}

/// |got - truth| / |truth| over a whole tensor.
fn error(got: &[f64], truth: &[f64]) -> f64 {
    assert_eq!(got.len(), truth.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut got.iter().zip(truth).map(|(a, b)| a - b)) / norm(&mut truth.iter().copied()).max(f64::MIN_POSITIVE)
}

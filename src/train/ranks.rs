//! The processes that train one run together, its ranks: started by `mpirun` or `srun`, joined by
//! MPI (feature `mpi`).
//!
//! All read the same tables and come to the same decisions. They share out the slides of an update,
//! and what each slide came to reaches everybody in the order of the slides: no result depends on
//! how many ranks there are. The first rank alone writes.

// Without the feature there are no ranks, and so nothing of theirs is ever run.
#![cfg_attr(not(feature = "mpi"), allow(dead_code, unreachable_code, unused_mut, unused_variables))]

#[cfg(feature = "mpi")]
use mpi::{
    collective::{CommunicatorCollectives, Root},
    datatype::{Partition, PartitionMut},
    environment::Universe,
    topology::{Communicator, SimpleCommunicator},
};

use crate::{Error, Result};

/// This process among those that train together, two or more.
pub struct Ranks {
    number: usize,
    count: usize,
    link: Link,
}

/// What joins them. Without the feature nothing does, and there is no `Ranks`.
enum Link {
    #[cfg(feature = "mpi")]
    Mpi { world: SimpleCommunicator, _until_dropped: Universe },
}

/// Values of a slide's gradient that are exchanged at a time: those of an update's slides stay in
/// the cache.
const PIECE: usize = 1 << 16;

impl Ranks {
    /// Those that `mpirun` or `srun` started; None where this process is alone.
    pub fn from_environment() -> Result<Option<Self>> {
        match launched(|name| std::env::var(name).ok()) {
            0 | 1 => Ok(None),
            count => Self::join(count).map(Some),
        }
    }

    #[cfg(feature = "mpi")]
    fn join(launched: usize) -> Result<Self> {
        let (universe, _) = mpi::initialize_with_threading(mpi::Threading::Funneled)
            .ok_or_else(|| Error::Device("MPI is already in use in this process".into()))?;
        let world = universe.world();
        let (number, count) = (world.rank() as usize, world.size() as usize);
        if count < 2 {
            return Err(Error::Device(format!(
                "{launched} processes were started together, but MPI joins none of them: this program's MPI library is not the \
                 launcher's (try mpirun of the same library, or srun --mpi=pmix)"
            )));
        }
        Ok(Self { number, count, link: Link::Mpi { world, _until_dropped: universe } })
    }

    #[cfg(not(feature = "mpi"))]
    fn join(launched: usize) -> Result<Self> {
        Err(Error::Usage(format!(
            "{launched} processes were started together, but this program was built without MPI: build it with --features mpi \
             (Debian: openmpi-bin, libopenmpi-dev and libclang-dev), or start one process"
        )))
    }

    /// This one's number, from 0.
    pub fn number(&self) -> usize {
        self.number
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Shares slides of these costs out: the rank of each. The costliest are given away first, each
    /// to the rank with the least so far (Graham 1969).
    pub fn share(&self, costs: &[f64]) -> Vec<usize> {
        share(costs, self.count)
    }

    /// Waits until all have come here.
    pub fn wait(&self) {
        match self.link {
            #[cfg(feature = "mpi")]
            Link::Mpi { ref world, .. } => world.barrier(),
        }
    }

    /// Ends all ranks, with this exit code.
    pub fn abort(&self, code: i32) -> ! {
        match self.link {
            #[cfg(feature = "mpi")]
            Link::Mpi { ref world, .. } => world.abort(code),
        }
    }

    /// Ends in order, when the others do.
    pub fn leave(self) {}

    /// What the first rank says, to all.
    pub fn tell(&self, text: &str) -> Result<String> {
        match self.link {
            #[cfg(feature = "mpi")]
            Link::Mpi { ref world, .. } => {
                let first = world.process_at_rank(0);
                let mut length = text.len() as u64;
                first.broadcast_into(&mut length);
                let mut bytes = text.as_bytes().to_vec();
                bytes.resize(length as usize, 0);
                if !bytes.is_empty() {
                    first.broadcast_into(&mut bytes[..]); // MPI refuses the address of nothing
                }
                String::from_utf8(bytes).map_err(|_| Error::Device("the first rank's words did not arrive".into()))
            }
        }
    }

    /// Whether any rank says yes.
    pub fn any(&self, mine: bool) -> bool {
        self.gather(&[f64::from(u8::from(mine))], &vec![1; self.count]).contains(&1.0)
    }

    /// The values of slides, `each` of every slide, in the order of the slides; `of` has each
    /// slide's rank, and `mine` the values of this one's slides.
    pub fn in_order(&self, of: &[usize], mine: &[f64], each: usize) -> Vec<f64> {
        let counts: Vec<usize> = (0..self.count).map(|rank| each * slides_of(of, rank)).collect();
        let all = self.gather(mine, &counts);
        let mut next: Vec<usize> = starts(&counts);
        let mut values = Vec::with_capacity(all.len());
        for &rank in of {
            values.extend_from_slice(&all[next[rank]..][..each]);
            next[rank] += each;
        }
        values
    }

    /// The values of all ranks, one behind the other; each has so many.
    fn gather(&self, mine: &[f64], counts: &[usize]) -> Vec<f64> {
        let mut all = vec![0.0; counts.iter().sum()];
        match self.link {
            #[cfg(feature = "mpi")]
            Link::Mpi { ref world, .. } => {
                let (counts, starts) = (small(counts), small(&starts(counts)));
                world.all_gather_varcount_into(mine, &mut PartitionMut::new(&mut all[..], counts, starts));
            }
        }
        all
    }

    /// Adds the gradients of slides to `sums`, slide by slide in their order, on every rank. `of`
    /// has each slide's rank, and `mine` the gradients of this one's slides.
    pub fn add_in_order(&self, of: &[usize], mine: &[Vec<f32>], sums: &mut [f32]) {
        let (mut sent, mut received) = (Vec::new(), Vec::new());
        // each rank sums a part of every piece, for all
        for (start, piece) in sums.chunks_mut(PIECE).enumerate().map(|(i, piece)| (i * PIECE, piece)) {
            let parts: Vec<usize> = (0..=self.count).map(|rank| rank * piece.len() / self.count).collect();
            let part = |rank: usize| parts[rank]..parts[rank + 1];
            let own = part(self.number);
            sent.clear();
            for rank in 0..self.count {
                mine.iter().for_each(|slide| sent.extend_from_slice(&slide[start..][part(rank)]));
            }
            let sends: Vec<usize> = (0..self.count).map(|rank| mine.len() * part(rank).len()).collect();
            let receives: Vec<usize> = (0..self.count).map(|rank| slides_of(of, rank) * own.len()).collect();
            received.resize(receives.iter().sum(), 0.0);
            self.exchange(&sent, &sends, &mut received, &receives);
            let mut next = starts(&receives);
            let mut summed = piece[own].to_vec();
            for &rank in of {
                let slide = &received[next[rank]..][..summed.len()];
                summed.iter_mut().zip(slide).for_each(|(sum, x)| *sum += x);
                next[rank] += summed.len();
            }
            let counts: Vec<usize> = (0..self.count).map(|rank| part(rank).len()).collect();
            self.gather_into(&summed, &counts, piece);
        }
    }

    /// Every rank's values for every other.
    fn exchange(&self, sent: &[f32], sends: &[usize], received: &mut [f32], receives: &[usize]) {
        match self.link {
            #[cfg(feature = "mpi")]
            Link::Mpi { ref world, .. } => {
                let sent = Partition::new(sent, small(sends), small(&starts(sends)));
                let mut received = PartitionMut::new(received, small(receives), small(&starts(receives)));
                world.all_to_all_varcount_into(&sent, &mut received);
            }
        }
    }

    fn gather_into(&self, mine: &[f32], counts: &[usize], all: &mut [f32]) {
        match self.link {
            #[cfg(feature = "mpi")]
            Link::Mpi { ref world, .. } => {
                let (counts, starts) = (small(counts), small(&starts(counts)));
                world.all_gather_varcount_into(mine, &mut PartitionMut::new(all, counts, starts));
            }
        }
    }
}

/// How many processes a launcher says it started together; 0 where there is none. Open MPI's
/// variable, that of MPICH and its descendants (and of `srun --mpi=pmi2`), and `srun --mpi=pmix`,
/// which leaves the number to Slurm's own.
fn launched(variable: impl Fn(&str) -> Option<String>) -> usize {
    let number = |name: &str| variable(name).and_then(|text| text.parse().ok());
    let pmix = variable("PMIX_RANK").and_then(|_| number("SLURM_STEP_NUM_TASKS"));
    number("OMPI_COMM_WORLD_SIZE").or_else(|| number("PMI_SIZE")).or(pmix).unwrap_or(0)
}

fn share(costs: &[f64], ranks: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by(|&a, &b| costs[b].total_cmp(&costs[a])); // stable: of equals the first comes first
    let (mut sums, mut of) = (vec![0.0; ranks], vec![0; costs.len()]);
    for slide in order {
        let least = (0..ranks).min_by(|&a, &b| f64::total_cmp(&sums[a], &sums[b])).unwrap_or(0);
        of[slide] = least;
        sums[least] += costs[slide];
    }
    of
}

fn slides_of(of: &[usize], rank: usize) -> usize {
    of.iter().filter(|&&owner| owner == rank).count()
}

/// Where each rank's values begin, one behind the other.
fn starts(counts: &[usize]) -> Vec<usize> {
    let before = counts.iter().scan(0, |sum, count| {
        let start = *sum;
        *sum += count;
        Some(start)
    });
    before.collect()
}

/// As MPI counts; a piece of all slides of an update is far below 2^31.
#[cfg(feature = "mpi")]
fn small(counts: &[usize]) -> Vec<i32> {
    counts.iter().map(|&count| count as i32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launcher_is_known_by_what_it_says() {
        let under = |pairs: &[(&str, &str)]| {
            launched(|name| pairs.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string()))
        };
        assert_eq!(under(&[]), 0);
        assert_eq!(under(&[("OMPI_COMM_WORLD_SIZE", "4")]), 4);
        assert_eq!(under(&[("PMI_SIZE", "3"), ("PMI_RANK", "1")]), 3);
        assert_eq!(under(&[("PMIX_RANK", "0"), ("SLURM_STEP_NUM_TASKS", "2")]), 2);
        // a batch job of several tasks whose script runs one program
        assert_eq!(under(&[("SLURM_NTASKS", "8"), ("SLURM_PROCID", "0")]), 0);
    }

    /// Each slide goes to one rank, and none has more than a slide beyond its part.
    #[test]
    fn slides_are_shared_by_their_cost() {
        let costs: Vec<f64> = (0..32).map(|i| f64::from((i * 37) % 32 + 1)).collect();
        for ranks in 1..=5 {
            let of = share(&costs, ranks);
            let mut sums = vec![0.0; ranks];
            of.iter().zip(&costs).for_each(|(&rank, cost)| sums[rank] += cost);
            let mean = costs.iter().sum::<f64>() / ranks as f64;
            assert!(sums.iter().all(|sum| (sum - mean).abs() <= 0.02 * mean), "{ranks}: {sums:?}");
        }
        assert_eq!(share(&[1.0, 1.0, 1.0], 4), [0, 1, 2]);
        assert_eq!(share(&[1.0, 9.0, 8.0], 2), [1, 0, 1]);
    }
}

//! Bags that come part by part, so that no tensor as long as a bag of features is held.

use std::ops::Range;

use super::{Bag, Context, bags::copy, policy::pieces};
use crate::{
    Result,
    device::{Device, Element, View},
};

/// Parts of a bag that are on a GPU at a time: one is copied while the one before is worked on.
pub(crate) const STREAM_BUFFERS: usize = 2;

/// Bags on their way.
pub(super) struct Stream<'a, T: Element> {
    bags: Vec<Bag<'a, T>>,
    /// At most so many at a time, of each bag.
    patches: usize,
    /// What each bag's parts are copied to in turn; none where its memory serves as it is.
    buffers: Vec<Vec<View<T>>>,
}

/// A part of each bag that reaches so far, where the device finds it.
pub(super) struct Staged<T: Element> {
    /// Of patches.
    pub range: Range<usize>,
    /// By place in the stream.
    pub bags: Vec<(usize, View<T>)>,
}

impl<'a, T: Element> Stream<'a, T> {
    /// With its buffers on the saved stack.
    pub fn new(ctx: &mut Context, bags: Vec<Bag<'a, T>>, patches: usize) -> Result<Self> {
        let mut buffers = Vec::new();
        for bag in &bags {
            let count = match bag {
                _ if ctx.device.runs_kernels() => STREAM_BUFFERS,
                Bag::Memory(_) => 0,
                Bag::Reader(_) => 1,
            };
            let rows = bag.patches().min(patches);
            let of_bag = (0..count).map(|_| ctx.arena.save(rows, ctx.config.features));
            buffers.push(of_bag.collect::<Result<_>>()?);
        }
        Ok(Self { bags, patches, buffers })
    }

    /// Patches of the longest bag.
    pub fn longest(&self) -> usize {
        self.bags.iter().map(Bag::patches).max().unwrap_or(0)
    }

    /// The bags' parts, each copied while the device works on the one before.
    pub fn parts<'s>(&'s self, device: &'s Device) -> impl Iterator<Item = Result<Staged<T>>> + 's {
        let mut before = device.fence();
        pieces(self.longest(), Some(self.patches)).enumerate().map(move |(turn, range)| {
            // where this part goes was last read by the last but one, whose work was all started
            // before the last one's
            let free = std::mem::replace(&mut before, device.fence())?;
            let mut bags = Vec::new();
            for (place, (bag, buffers)) in self.bags.iter().zip(&self.buffers).enumerate() {
                let rows = range.start..bag.patches().min(range.end);
                if rows.start >= rows.end {
                    continue;
                }
                let view = match bag {
                    Bag::Memory(bag) if buffers.is_empty() => bag.rows_range(rows),
                    bag => {
                        let staged = buffers[turn % buffers.len()].rows_range(0..rows.len());
                        copy(device, bag, rows.start, staged, &free)?;
                        staged
                    }
                };
                bags.push((place, view));
            }
            Ok(Staged { range, bags })
        })
    }
}

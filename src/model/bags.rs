//! A slide's patch features, as the model takes them: in memory, or read part by part from wherever they lie.

use std::{marker::PhantomData, ops::Range};

use crate::{
    Error, Result,
    device::{ALIGNMENT, Buffer, Device, Element, Fence, View, copy_by_all_threads},
};

/// Where a GPU keeps the bags of a slide that are held whole. A device has two and takes them in turn: one slide's bags arrive while the slide
/// before is worked on.
pub struct Room {
    buffer: Buffer,
    used: usize,
    /// The end of the work that last read it.
    free: Fence,
}

impl Room {
    pub(crate) fn new(device: &Device, bytes: usize) -> Result<Self> {
        Ok(Self { buffer: device.alloc(bytes)?, used: 0, free: device.fence()? })
    }

    /// As large as anything could ask for; only for [`Device::Dry`].
    pub(crate) fn unlimited() -> Self {
        Self { buffer: Buffer::imaginary(1 << 56), used: 0, free: Fence::Done }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.buffer.bytes()
    }

    /// Bytes that the slide takes so far.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// For the next slide.
    pub(crate) fn clear(&mut self) {
        self.used = 0;
    }

    /// After the last work that reads it has been started.
    pub(crate) fn release(&mut self, device: &Device) -> Result<()> {
        self.free = device.fence()?;
        Ok(())
    }

    /// A copy of a whole bag, on its way: work started from now on finds it.
    pub(super) fn receive<T: Element>(
        &mut self,
        device: &Device,
        bag: &Bag<'_, T>,
        features: usize,
    ) -> Result<View<T>> {
        let at = self.used.next_multiple_of(ALIGNMENT);
        let bytes = bag.patches() * features * size_of::<T>();
        self.used = at + bytes;
        let view = self.buffer.view(at / size_of::<T>(), bag.patches(), features);
        copy(device, bag, 0, view, &self.free)?;
        Ok(view)
    }
}

/// Copies a bag's patches from `first` on to the device, as soon as the work before `after` has ended.
pub(super) fn copy<T: Element>(
    device: &Device,
    bag: &Bag<'_, T>,
    first: usize,
    to: View<T>,
    after: &Fence,
) -> Result<()> {
    device.fill(to, after, |rows, out| {
        let patches = first + rows.start..first + rows.end;
        match bag {
            // SAFETY: bags borrow host memory that nobody writes.
            Bag::Memory(bag) => copy_by_all_threads(unsafe { bag.rows_range(patches).slice() }, out),
            Bag::Reader(reader) => reader.read(patches, out)?,
        }
        Ok(())
    })
}

/// Reads patches of a bag: a file, say. Called from any thread.
pub trait ReadPatches<T>: Sync {
    fn patches(&self) -> usize;
    /// Fills `out`, row-major, with these patches.
    fn read(&self, patches: Range<usize>, out: &mut [T]) -> Result<()>;
}

/// Where a bag's features `[patches, features]` are.
#[derive(Clone, Copy)]
pub(crate) enum Bag<'a, T> {
    /// In host memory.
    Memory(View<T>),
    Reader(&'a dyn ReadPatches<T>),
}

impl<T: Element> Bag<'_, T> {
    pub fn patches(&self) -> usize {
        match self {
            Self::Memory(view) => view.rows(),
            Self::Reader(reader) => reader.patches(),
        }
    }

    /// Itself, where it is in memory.
    pub fn view(&self) -> Option<View<T>> {
        if let Self::Memory(view) = self { Some(*view) } else { None }
    }
}

/// A slide's features at 5x, 10x and 20x, `[M5, F]`, `[N, F]`, `[M20, F]`, borrowed.
#[derive(Clone, Copy)]
pub struct Bags<'a, T> {
    pub(crate) x5: Bag<'a, T>,
    pub(crate) x10: View<T>,
    pub(crate) x20: Bag<'a, T>,
    owner: PhantomData<&'a [T]>,
}

impl<'a, T: Element> Bags<'a, T> {
    /// Row-major features of x5, x10 and x20, `features` values a patch.
    pub fn new(bags: [&'a [T]; 3], features: usize) -> Result<Self> {
        let [x5, x10, x20] = bags.map(|x| view(x, features));
        Ok(Self::of_views(x5?, x10?, x20?))
    }

    /// x5 and x20 are read part by part, twice in a training step; x10 is in memory.
    pub fn streamed(
        x5: &'a dyn ReadPatches<T>,
        x10: &'a [T],
        x20: &'a dyn ReadPatches<T>,
        features: usize,
    ) -> Result<Self> {
        Ok(Self { x5: Bag::Reader(x5), x10: view(x10, features)?, x20: Bag::Reader(x20), owner: PhantomData })
    }

    /// Memory that receives the bags' gradients.
    pub fn new_mut(bags: [&'a mut [T]; 3], features: usize) -> Result<Self> {
        // SAFETY: `owner` keeps the slices borrowed as long as the views can be reached.
        let view = |x: &mut [T]| Ok::<_, Error>(unsafe { View::of_slice_mut(x, patches(x, features)?, features) });
        let [x5, x10, x20] = bags;
        Ok(Self::of_views(view(x5)?, view(x10)?, view(x20)?))
    }

    /// Views that the caller keeps alive.
    pub(crate) fn of_views(x5: View<T>, x10: View<T>, x20: View<T>) -> Self {
        Self { x5: Bag::Memory(x5), x10, x20: Bag::Memory(x20), owner: PhantomData }
    }
}

fn view<T: Element>(x: &[T], features: usize) -> Result<View<T>> {
    // SAFETY: the caller's `Bags` keeps the slice borrowed as long as the view can be reached.
    Ok(unsafe { View::of_slice(x, patches(x, features)?, features) })
}

/// Rows of `features` values in a bag.
fn patches<T>(bag: &[T], features: usize) -> Result<usize> {
    if features == 0 || !bag.len().is_multiple_of(features) {
        let message =
            format!("a bag of {} values: expected a whole number of patches of {features} features", bag.len());
        return Err(Error::Usage(message));
    }
    Ok(bag.len() / features)
}

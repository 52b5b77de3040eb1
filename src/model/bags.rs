//! A slide's patch features, as the model takes them: in memory, or read part by part from wherever
//! they lie.

use std::{marker::PhantomData, ops::Range};

use super::scale::{BagSizes, Scale, Scales};
use crate::{
    Error, Result,
    device::{ALIGNMENT, Arena, Buffer, Device, Element, Fence, View, copy_by_all_threads},
};

/// Where a GPU keeps the bags of a slide that are held whole. A device has two and takes them in
/// turn: one slide's bags arrive while the slide before is worked on.
pub(crate) struct Room {
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

    /// Until the work that last read it has ended.
    pub(crate) fn wait(&self, device: &Device) -> Result<()> {
        device.wait(&self.free)
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

/// Copies a bag's patches from `first` on to the device, as soon as the work before `after` has
/// ended.
pub(super) fn copy<T: Element>(
    device: &Device,
    bag: &Bag<'_, T>,
    first: usize,
    to: View<T>,
    after: &Fence,
) -> Result<()> {
    device.fill(to, after, |rows, out| bag.read(first + rows.start..first + rows.end, out))
}

/// Reads patches of a bag: a file, say. Called from any thread.
pub trait ReadPatches<T>: Sync {
    /// How many the bag holds, the same at every call.
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

    /// Copies these patches to `out`.
    pub fn read(&self, patches: Range<usize>, out: &mut [T]) -> Result<()> {
        match self {
            // SAFETY: bags borrow host memory that nobody writes.
            Self::Memory(bag) => copy_by_all_threads(unsafe { bag.rows_range(patches).slice() }, out),
            Self::Reader(reader) => reader.read(patches, out)?,
        }
        Ok(())
    }

    /// Itself, where it is in memory.
    pub fn view(&self) -> Option<View<T>> {
        if let Self::Memory(view) = self { Some(*view) } else { None }
    }
}

/// A slide's patch features at each of its scales, borrowed.
#[derive(Clone, Copy)]
pub struct Bags<'a, T> {
    bags: Scales<Bag<'a, T>>,
    owner: PhantomData<&'a [T]>,
}

/// Features of one scale, as [`Bags::of`] takes them.
#[derive(Clone, Copy)]
pub enum Features<'a, T> {
    /// Row-major, all patches.
    Memory(&'a [T]),
    /// Read part by part, twice in a training step.
    Reader(&'a dyn ReadPatches<T>),
}

impl<'a, T: Element> Bags<'a, T> {
    /// Row-major features of each scale, `features` values a patch.
    pub fn new(bags: impl Into<Scales<&'a [T]>>, features: usize) -> Result<Self> {
        Self::of(bags.into().map(|_, bag| Features::Memory(bag)), features)
    }

    /// The same, wherever they lie.
    pub fn of(bags: impl Into<Scales<Features<'a, T>>>, features: usize) -> Result<Self> {
        let bag = |_, bag: Features<'a, T>| {
            Ok::<_, Error>(match bag {
                // SAFETY: `owner` keeps the slice borrowed as long as the view can be reached.
                Features::Memory(x) => Bag::Memory(unsafe { View::of_slice(x, patches(x, features)?, features) }),
                Features::Reader(reader) => Bag::Reader(reader),
            })
        };
        Ok(Self::of_bags(bags.into().try_map(bag)?))
    }

    /// Views that the caller keeps alive, and readers.
    pub(crate) fn of_bags(bags: Scales<Bag<'a, T>>) -> Self {
        Self { bags, owner: PhantomData }
    }

    /// The numbers of patches at the scales that the slide has.
    pub fn sizes(&self) -> BagSizes {
        self.bags.map(|_, bag| bag.patches())
    }

    /// Whether a scale's features, if there are any, are in memory.
    pub(crate) fn is_held(&self, scale: Scale) -> bool {
        self.bags.get(scale).is_none_or(|bag| bag.view().is_some())
    }

    /// The bag of a scale; an error unless it has patches of so many features.
    pub(crate) fn get(&self, scale: Scale, features: usize) -> Result<Bag<'a, T>> {
        let Some(&bag) = self.bags.get(scale) else {
            return Err(Error::Usage(format!("the slide has no features at {scale}, which the model reads")));
        };
        let (patches, width) = (bag.patches(), bag.view().map_or(features, |view| view.cols()));
        if patches == 0 || width != features {
            let (got, expected) = (vec![patches, width], vec![patches.max(1), features]);
            return Err(Error::Shape { op: "the model", tensor: scale.name().into(), got, expected });
        }
        Ok(bag)
    }
}

/// Memory that receives the gradients of a slide's bags, or what each patch contributes by them.
pub struct BagGrads<'a, T> {
    bags: Scales<BagGrad<T>>,
    owner: PhantomData<&'a mut [T]>,
}

/// What becomes of a bag's gradient.
#[derive(Clone, Copy)]
pub(super) enum BagGrad<T> {
    /// It is written down, `[patches, features]`.
    Whole(View<T>),
    /// Its product with the features less those of a reference, summed over each patch. The
    /// gradient itself is formed nowhere.
    Products {
        /// `[1, features]` in host memory.
        reference: View<T>,
        /// `[patches, 1]` in host memory.
        out: View<f64>,
    },
}

impl<T: Element> BagGrad<T> {
    pub fn rows_range(self, rows: Range<usize>) -> Self {
        match self {
            Self::Whole(view) => Self::Whole(view.rows_range(rows)),
            Self::Products { reference, out } => Self::Products { reference, out: out.rows_range(rows) },
        }
    }
}

impl<'a, T: Element> BagGrads<'a, T> {
    /// As long as the features of [`Bags::new`].
    pub fn new(bags: impl Into<Scales<&'a mut [T]>>, features: usize) -> Result<Self> {
        let view = |_, x: &'a mut [T]| {
            let rows = patches(x, features)?;
            // SAFETY: `owner` keeps the slice borrowed as long as the view can be reached.
            Ok::<_, Error>(BagGrad::Whole(unsafe { View::of_slice_mut(x, rows, features) }))
        };
        Ok(Self { bags: bags.into().try_map(view)?, owner: PhantomData })
    }

    /// A value a patch: the sum over its features x of (x - reference) times the gradient in x. Each
    /// scale has a reference `[features]`, and memory for as many values as there are patches.
    pub fn products(bags: impl Into<Scales<(&'a [T], &'a mut [f64])>>) -> Self {
        let view = |_, (reference, out): (&'a [T], &'a mut [f64])| {
            let (features, patches) = (reference.len(), out.len());
            // SAFETY: `owner` keeps both slices borrowed as long as the views can be reached.
            let (reference, out) =
                unsafe { (View::of_slice(reference, 1, features), View::of_slice_mut(out, patches, 1)) };
            BagGrad::Products { reference, out }
        };
        Self { bags: bags.into().map(view), owner: PhantomData }
    }

    /// Bytes of a device's memory that the gradients take while a step is on its way back.
    pub(crate) fn device_bytes(&self) -> Result<usize> {
        let bytes = |grad: &BagGrad<T>| match grad {
            BagGrad::Whole(view) => Arena::matrix_bytes::<T>(view.rows(), view.cols()),
            BagGrad::Products { .. } => Ok(0),
        };
        self.bags.values().map(bytes).sum()
    }

    /// Where the gradient of a scale's bag goes, which has to be of these sizes.
    pub(super) fn get(&self, scale: Scale, patches: usize, features: usize) -> Result<BagGrad<T>> {
        let Some(&grad) = self.bags.get(scale) else {
            return Err(Error::Usage(format!("there is no memory for the gradient at {scale}")));
        };
        let name = format!("gradient of {scale}");
        match grad {
            BagGrad::Whole(view) => view.check("the model", &name, &[patches, features])?,
            BagGrad::Products { reference, out } => {
                reference.check("the model", &format!("reference of {scale}"), &[1, features])?;
                out.check("the model", &name, &[patches, 1])?;
            }
        }
        Ok(grad)
    }
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

//! Memory and the matrices in it.

use std::marker::PhantomData;

use cudarc::driver::{CudaSlice, DevicePtr};
use memmap2::MmapMut;

#[cfg(feature = "emulator")]
use super::emulator::Registered;
use super::{Cuda, Element, is_rounded, pinned::PageLocked};
use crate::{Error, Result};

/// Memory of one device, zeroed when new and freed when dropped.
pub(crate) struct Buffer {
    address: usize,
    bytes: usize,
    _owner: Owner,
}

enum Owner {
    /// Pages come from the system when first touched, so an arena costs what it uses.
    Pages {
        _pages: MmapMut,
    },
    Gpu {
        _slice: CudaSlice<u8>,
    },
    PageLocked {
        _memory: PageLocked,
    },
    #[cfg(feature = "emulator")]
    Emulator {
        _range: Registered,
        _pages: MmapMut,
    },
    Nobody,
}

impl Buffer {
    pub(super) fn host(bytes: usize) -> Result<Self> {
        let mut pages = MmapMut::map_anon(bytes.max(1)).map_err(|e| {
            Error::Device(format!("cannot allocate {:.1} MiB of memory: {e}", bytes as f64 / 1048576.0))
        })?;
        // Large pages save a tenth of the step in address translation; a kernel without them only
        // says no.
        #[cfg(target_os = "linux")]
        let _ = pages.advise(memmap2::Advice::HugePage);
        Ok(Self { address: pages.as_mut_ptr() as usize, bytes, _owner: Owner::Pages { _pages: pages } })
    }

    /// Host memory that the emulator's kernels may touch; race mode asks for the range.
    #[cfg(feature = "emulator")]
    pub(super) fn emulator(bytes: usize, race: bool) -> Result<Self> {
        let host = Self::host(bytes)?;
        let (true, Owner::Pages { _pages }) = (race, host._owner) else { return Self::host(bytes) };
        let _range = Registered::new(_pages.as_ptr().cast(), bytes)?;
        Ok(Self { address: host.address, bytes, _owner: Owner::Emulator { _range, _pages } })
    }

    pub(super) fn cuda(cuda: &Cuda, bytes: usize) -> Result<Self> {
        let slice = cuda.alloc(bytes)?;
        let address = slice.device_ptr(slice.stream()).0 as usize;
        Ok(Self { address, bytes, _owner: Owner::Gpu { _slice: slice } })
    }

    /// Memory of the host that kernels write to.
    pub(super) fn cuda_shared(cuda: &Cuda, bytes: usize) -> Result<Self> {
        let memory = cuda.alloc_page_locked(bytes)?;
        Ok(Self { address: memory.address(), bytes, _owner: Owner::PageLocked { _memory: memory } })
    }

    /// What a buffer of [`Device::alloc_shared`](super::Device::alloc_shared) holds; None of
    /// another. Its writers must have been waited for.
    pub(super) fn peek(&self) -> Option<Vec<u8>> {
        match self._owner {
            Owner::Gpu { .. } => None,
            Owner::Nobody => Some(vec![0; self.bytes]),
            // SAFETY: live memory of the host, which nobody writes now.
            _ => Some(unsafe { std::slice::from_raw_parts(self.address as *const u8, self.bytes) }.to_vec()),
        }
    }

    /// Fills a row in memory of the host; None where it is the GPU's. Nobody may be reading it.
    pub(super) fn poke<T: Element>(&self, values: &[T], to: View<T>) -> Option<()> {
        match self._owner {
            Owner::Gpu { .. } => return None,
            Owner::Nobody => {}
            // SAFETY: a row of live memory of the host, which nobody reads or writes now.
            _ => unsafe { to.row_mut(0) }.copy_from_slice(values),
        }
        Some(())
    }

    /// Addresses that nothing backs.
    pub(crate) fn imaginary(bytes: usize) -> Self {
        Self { address: 1 << 62, bytes, _owner: Owner::Nobody }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The `[rows, cols]` matrix of `T` that starts `offset` elements into the buffer.
    pub(crate) fn view<T: Element>(&self, offset: usize, rows: usize, cols: usize) -> View<T> {
        let end = rows
            .checked_mul(cols)
            .and_then(|len| len.checked_add(offset))
            .and_then(|end| end.checked_mul(size_of::<T>()));
        assert!(end.is_some_and(|end| end <= self.bytes), "view past the end of a buffer");
        View::new(self.address + offset * size_of::<T>(), rows, cols)
    }

    /// The whole buffer as one row.
    pub(crate) fn flat<T: Element>(&self) -> View<T> {
        self.view(0, 1, self.bytes / size_of::<T>())
    }

    /// Where it starts, as kernels take it.
    pub(crate) fn address(&self) -> u64 {
        self.address as u64
    }
}

/// A row-major matrix somewhere in a [`Buffer`]: an address and a shape, free to copy.
///
/// Views carry no lifetime, which keeps model code plain. Ops check shapes; that the memory behind
/// a view is alive and on the op's device, and that an op's outputs do not overlap its inputs
/// unless the op says so, is the caller's duty.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View<T> {
    address: usize,
    rows: usize,
    cols: usize,
    /// Elements from one row to the next.
    stride: usize,
    element: PhantomData<T>,
}

impl<T: Copy> View<T> {
    pub(super) fn new(address: usize, rows: usize, cols: usize) -> Self {
        Self { address, rows, cols, stride: cols, element: PhantomData }
    }

    pub(super) fn strided(address: usize, rows: usize, cols: usize, stride: usize) -> Self {
        Self { address, rows, cols, stride, element: PhantomData }
    }

    /// A view of host memory that some other owner keeps alive (a memory-mapped bag, say), to read.
    ///
    /// # Safety
    /// `data` must stay alive and unwritten as long as the view, or a copy of it, is used, and no
    /// op may write through it.
    pub(crate) unsafe fn of_slice(data: &[T], rows: usize, cols: usize) -> Self {
        assert_eq!(Some(data.len()), rows.checked_mul(cols));
        Self::new(data.as_ptr() as usize, rows, cols)
    }

    /// The same, to write.
    ///
    /// # Safety
    /// `data` must stay alive and otherwise untouched as long as the view, or a copy of it, is
    /// used.
    pub(crate) unsafe fn of_slice_mut(data: &mut [T], rows: usize, cols: usize) -> Self {
        assert_eq!(Some(data.len()), rows.checked_mul(cols));
        Self::new(data.as_mut_ptr() as usize, rows, cols)
    }

    pub(crate) fn rows(self) -> usize {
        self.rows
    }

    pub(crate) fn cols(self) -> usize {
        self.cols
    }

    pub(crate) fn stride(self) -> usize {
        self.stride
    }

    pub(crate) fn rows_range(self, rows: std::ops::Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        let address = self.address + rows.start * self.stride * size_of::<T>();
        Self { address, rows: rows.len(), ..self }
    }

    pub(crate) fn cols_range(self, cols: std::ops::Range<usize>) -> Self {
        assert!(cols.start <= cols.end && cols.end <= self.cols);
        Self { address: self.address + cols.start * size_of::<T>(), cols: cols.len(), ..self }
    }

    /// The same elements in another shape; the view must be contiguous.
    pub(crate) fn reshape(self, rows: usize, cols: usize) -> Self {
        assert!(rows * cols == self.rows * self.cols && (self.stride == self.cols || self.rows == 1));
        Self { rows, cols, stride: cols, ..self }
    }

    /// Where the first element lies, as kernels take it.
    pub(crate) fn address(self) -> u64 {
        self.address as u64
    }

    pub(crate) fn ptr(self) -> *mut T {
        self.address as *mut T
    }

    /// # Safety
    /// The view must lie in live host memory that nobody writes meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn row<'a>(self, i: usize) -> &'a [T] {
        debug_assert!(i < self.rows);
        // SAFETY: the caller's: live memory; the row lies in the view.
        unsafe { std::slice::from_raw_parts(self.ptr().add(i * self.stride), self.cols) }
    }

    /// # Safety
    /// The view must lie in live host memory that nobody else reads or writes meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn row_mut<'a>(self, i: usize) -> &'a mut [T] {
        debug_assert!(i < self.rows);
        // SAFETY: the caller's: live memory of its own; the row lies in the view.
        unsafe { std::slice::from_raw_parts_mut(self.ptr().add(i * self.stride), self.cols) }
    }

    /// All elements of a contiguous view.
    ///
    /// # Safety
    /// As for [`View::row`].
    pub(crate) unsafe fn slice<'a>(self) -> &'a [T] {
        assert!(self.stride == self.cols || self.rows <= 1);
        // SAFETY: the caller's: live memory; the rows have no gaps.
        unsafe { std::slice::from_raw_parts(self.ptr(), self.rows * self.cols) }
    }

    /// The same, to write.
    ///
    /// # Safety
    /// As for [`View::row_mut`].
    pub(crate) unsafe fn slice_mut<'a>(self) -> &'a mut [T] {
        assert!(self.stride == self.cols || self.rows <= 1);
        // SAFETY: the caller's: live memory of its own; the rows have no gaps.
        unsafe { std::slice::from_raw_parts_mut(self.ptr(), self.rows * self.cols) }
    }

    /// An error naming op and tensor unless the shape is `[rows, cols]`.
    pub(crate) fn check(self, op: &'static str, tensor: &str, expected: &[usize]) -> Result<()> {
        if [self.rows, self.cols] == expected {
            return Ok(());
        }
        Err(Error::Shape { op, tensor: tensor.into(), got: vec![self.rows, self.cols], expected: expected.to_vec() })
    }
}

impl<T: Element> View<T> {
    /// The same matrix as one that sums are kept in, where they are stored without rounding.
    pub(crate) fn as_sums(self) -> Option<View<T::Sum>> {
        let Self { address, rows, cols, stride, .. } = self;
        (!is_rounded::<T>()).then_some(View { address, rows, cols, stride, element: PhantomData })
    }

    /// [`View::as_sums`] the other way.
    pub(crate) fn of_sums(sums: View<T::Sum>) -> Option<Self> {
        let View { address, rows, cols, stride, .. } = sums;
        (!is_rounded::<T>()).then_some(Self { address, rows, cols, stride, element: PhantomData })
    }

    /// An error naming op and tensor unless every row begins and ends at 16 bytes, the pieces that
    /// most kernels move.
    pub(crate) fn check_for_kernels(self, op: &'static str, tensor: &str) -> Result<()> {
        const PIECE: usize = 16;
        /// A tile's kernel counts elements from its first row to its last of 128 in 32 bits.
        const MOST_STRIDE: usize = 1 << 24;
        if self.rows > 1 && self.stride >= MOST_STRIDE {
            let stride = self.stride;
            return Err(Error::Usage(format!("{op}: {tensor}'s rows are {stride} apart: kernels take less than 2^24")));
        }
        let splits = |elements: usize| (elements * size_of::<T>()).is_multiple_of(PIECE);
        if self.address.is_multiple_of(PIECE) && splits(self.cols) && (self.rows <= 1 || splits(self.stride)) {
            return Ok(());
        }
        let of = PIECE / size_of::<T>();
        Err(Error::Usage(format!(
            "{op}: {tensor} has {} columns, {} apart from row to row: kernels take rows that begin and end at multiples of {of}",
            self.cols, self.stride
        )))
    }
}

#![allow(non_camel_case_types)] // they are C's names
//! CrossFusion behind a C ABI: `include/crossfusion.h`, which cbindgen writes from this crate
//! (`CROSSFUSION_BLESS=1 cargo test -p crossfusion-c header`), and docs/embedding.md.
//!
//! Every function answers with a status; [`cf_last_error`] has the sentence. No panic crosses the
//! border.

mod context;
mod cox;
mod dlpack;
mod model;
mod ops;

use std::{
    cell::RefCell,
    ffi::{CString, c_char},
    panic::{AssertUnwindSafe, catch_unwind},
};

use engine::Error;

/// Grows whenever a struct or a function changes its meaning.
pub const CF_ABI_VERSION: u32 = 1;

/// The version of the library that is loaded: compare it with `CF_ABI_VERSION` of the header.
#[unsafe(no_mangle)]
pub extern "C" fn cf_abi_version() -> u32 {
    CF_ABI_VERSION
}

/// How a call ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum cf_status {
    CF_OK = 0,
    /// The call cannot be meant so: a shape, a type, a setting.
    CF_USAGE = 1,
    /// A file cannot be read or written, or is not what was expected.
    CF_FILE = 2,
    /// The device refused or failed: no GPU, no memory, a kernel's error.
    CF_DEVICE = 3,
    /// A defect of this library; please report it.
    CF_BUG = 4,
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// What was wrong with this thread's last call that failed, in a sentence; until its next call that
/// fails. Never null.
#[unsafe(no_mangle)]
pub extern "C" fn cf_last_error() -> *const c_char {
    LAST_ERROR.with_borrow(|text| text.as_ptr())
}

/// Runs one call.
fn guard(work: impl FnOnce() -> engine::Result<()>) -> cf_status {
    let (status, text) = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => return cf_status::CF_OK,
        Ok(Err(e)) => (status_of(&e), e.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            (cf_status::CF_BUG, format!("a defect of this library: {}", text.unwrap_or_default()))
        }
    };
    let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
    LAST_ERROR.set(text);
    status
}

fn status_of(e: &Error) -> cf_status {
    match e {
        Error::Device(_) => cf_status::CF_DEVICE,
        Error::Usage(_) | Error::Shape { .. } | Error::Statistic { .. } => cf_status::CF_USAGE,
        _ => cf_status::CF_FILE,
    }
}

fn usage(text: impl Into<String>) -> Error {
    Error::Usage(text.into())
}

/// What a pointer argument points to.
///
/// # Safety
/// It must be null, or point to a live `T`.
unsafe fn given<'a, T>(name: &str, pointer: *const T) -> engine::Result<&'a T> {
    // SAFETY: the caller's.
    unsafe { pointer.as_ref() }.ok_or_else(|| usage(format!("{name} is null")))
}

/// # Safety
/// As [`given`], and nobody else may use it meanwhile.
unsafe fn given_mut<'a, T>(name: &str, pointer: *mut T) -> engine::Result<&'a mut T> {
    // SAFETY: the caller's.
    unsafe { pointer.as_mut() }.ok_or_else(|| usage(format!("{name} is null")))
}

/// More elements of an array are a slip: what is made from them would find no memory.
const MOST_ELEMENTS: usize = 1 << 40;

/// An array argument; null is allowed where it is empty.
///
/// # Safety
/// It must be null, or point to so many live `T`.
unsafe fn array<'a, T>(name: &str, pointer: *const T, count: usize) -> engine::Result<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    if pointer.is_null() {
        return Err(usage(format!("{name} is null, but {count} are announced")));
    }
    if count > MOST_ELEMENTS {
        return Err(usage(format!("{name}: {count} elements, expected at most {MOST_ELEMENTS}")));
    }
    // SAFETY: the caller's.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

//! Whole-slide images, read by OpenSlide, whose library is loaded when the first slide is opened.

use std::ffi::{CStr, CString, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::OnceLock;

use crossfusion::{Error, Result};
use libloading::Library;

use crate::python::package_folder;

/// A slide that is open. Threads may share it: "all functions except openslide_close() are
/// thread-safe".
pub struct Slide {
    path: PathBuf,
    openslide: &'static OpenSlide,
    handle: NonNull<c_void>,
    levels: Vec<Level>,
}

/// A level of the slide's pyramid; level 0 is the largest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Level {
    /// In pixels.
    pub width: u64,
    /// In pixels.
    pub height: u64,
    /// By how much it is smaller than level 0, as OpenSlide says.
    pub downsample: f64,
}

/// Pixels of three bytes, red, green, blue, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// `3 * width * height` bytes.
    pub pixels: Vec<u8>,
}

// SAFETY: an openslide_t belongs to no thread.
unsafe impl Send for Slide {}
// SAFETY: what takes `&self` calls OpenSlide's thread-safe functions alone.
unsafe impl Sync for Slide {}

impl Slide {
    /// Opens a slide. An error if OpenSlide is not installed, does not know the format, or finds
    /// the file damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let openslide = OpenSlide::get()?;
        std::fs::File::open(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
        let name = CString::new(path.as_os_str().as_bytes()).map_err(|e| Error::file(path, e))?;
        // SAFETY: the name is a C string, which openslide_open copies.
        let handle = unsafe { (openslide.open)(name.as_ptr()) };
        let Some(handle) = NonNull::new(handle) else {
            return Err(Error::file(path, "is not a slide of a format that OpenSlide reads"));
        };
        let mut slide = Self { path: path.to_path_buf(), openslide, handle, levels: Vec::new() };
        slide.check()?;
        // SAFETY: the handle is open.
        let levels = unsafe { (openslide.get_level_count)(handle.as_ptr()) };
        for level in 0..levels {
            let (mut width, mut height) = (-1, -1);
            // SAFETY: the handle is open, and width and height are places for an i64 each.
            let downsample = unsafe {
                (openslide.get_level_dimensions)(handle.as_ptr(), level, &mut width, &mut height);
                (openslide.get_level_downsample)(handle.as_ptr(), level)
            };
            let (Ok(width @ 1..), Ok(height @ 1..)) = (u64::try_from(width), u64::try_from(height)) else {
                return Err(Error::file(path, format!("has a level {level} of {width} x {height} pixels")));
            };
            slide.levels.push(Level { width, height, downsample });
        }
        slide.check()?;
        if slide.levels.is_empty() {
            return Err(Error::file(path, "has no image"));
        }
        Ok(slide)
    }

    /// As it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's name without extension, as CLAM names a slide.
    pub fn name(&self) -> String {
        self.path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// From the largest to the smallest; at least one.
    pub fn levels(&self) -> &[Level] {
        &self.levels
    }

    /// The smallest level that is no smaller than level 0 by more than `downsample`.
    pub fn best_level_for_downsample(&self, downsample: f64) -> usize {
        // SAFETY: the handle is open.
        let level = unsafe { (self.openslide.get_best_level_for_downsample)(self.handle.as_ptr(), downsample) };
        usize::try_from(level).unwrap_or(0).min(self.levels.len() - 1)
    }

    /// A property of the slide, as `openslide.mpp-x` or `aperio.AppMag`.
    pub fn property(&self, name: &str) -> Option<String> {
        let name = CString::new(name).ok()?;
        // SAFETY: the handle is open; the value lives until it is closed, and is copied here.
        unsafe {
            let value = (self.openslide.get_property_value)(self.handle.as_ptr(), name.as_ptr());
            (!value.is_null()).then(|| CStr::from_ptr(value).to_string_lossy().into_owned())
        }
    }

    /// A property that is a positive number.
    fn number(&self, name: &str) -> Option<f64> {
        self.property(name)?.trim().parse().ok().filter(|x: &f64| x.is_finite() && *x > 0.0)
    }

    /// The power of the objective that level 0 was scanned with, if the slide says: 40, say.
    pub fn objective_power(&self) -> Option<f64> {
        self.number("openslide.objective-power")
    }

    /// Micrometres a pixel of level 0, the mean of both axes, if the slide says.
    pub fn microns_per_pixel(&self) -> Option<f64> {
        Some((self.number("openslide.mpp-x")? + self.number("openslide.mpp-y")?) / 2.0)
    }

    /// The pixels of a rectangle of a level; `x` and `y` are its corner in pixels of level 0, as
    /// OpenSlide has it. Opacity is undone and dropped, as openslide-python and PIL's
    /// `convert("RGB")` do it: where the slide has no pixels, they are black.
    pub fn read_region(&self, x: i64, y: i64, level: usize, width: usize, height: usize) -> Result<Image> {
        self.read(x, y, level, [width, height], without_opacity)
    }

    /// The same to look at: where the slide has no pixels, be it within or beyond its edge, they
    /// are white.
    pub fn read_on_white(&self, x: i64, y: i64, level: usize, width: usize, height: usize) -> Result<Image> {
        self.read(x, y, level, [width, height], on_white)
    }

    fn read(&self, x: i64, y: i64, level: usize, size: [usize; 2], colour: fn(u32) -> [u8; 3]) -> Result<Image> {
        if level >= self.levels.len() {
            let message = format!("has levels 0 to {}, and level {level} was to be read", self.levels.len() - 1);
            return Err(Error::file(&self.path, message));
        }
        let [width, height] = size;
        let mut argb = vec![0u32; width * height];
        let (w, h) = (width as i64, height as i64);
        // SAFETY: the handle is open, and the buffer has a pixel of 32 bits for each that is asked
        // for.
        unsafe { (self.openslide.read_region)(self.handle.as_ptr(), argb.as_mut_ptr(), x, y, level as i32, w, h) };
        self.check()?;
        let mut pixels = vec![0; 3 * width * height];
        for (pixel, argb) in pixels.chunks_exact_mut(3).zip(argb) {
            pixel.copy_from_slice(&colour(argb));
        }
        Ok(Image { width, height, pixels })
    }

    /// OpenSlide's error, after which the slide cannot be read any more.
    fn check(&self) -> Result<()> {
        // SAFETY: the handle is open; the text lives until it is closed, and is copied here.
        let message = unsafe {
            let message = (self.openslide.get_error)(self.handle.as_ptr());
            (!message.is_null()).then(|| CStr::from_ptr(message).to_string_lossy().into_owned())
        };
        message.map_or(Ok(()), |message| Err(Error::file(&self.path, format!("OpenSlide cannot read it: {message}"))))
    }
}

impl Drop for Slide {
    fn drop(&mut self) {
        // SAFETY: the handle is open, and nothing uses it after this.
        unsafe { (self.openslide.close)(self.handle.as_ptr()) };
    }
}

/// Red, green and blue of a pixel that is stored multiplied by its opacity.
fn without_opacity(argb: u32) -> [u8; 3] {
    let [opacity, r, g, b] = argb.to_be_bytes();
    match opacity {
        255 => [r, g, b],
        0 => [0; 3],
        _ => [r, g, b].map(|c| (255 * u32::from(c) / u32::from(opacity)) as u8),
    }
}

/// Red, green and blue of such a pixel on white.
fn on_white(argb: u32) -> [u8; 3] {
    let [opacity, r, g, b] = argb.to_be_bytes();
    [r, g, b].map(|c| c.saturating_add(255 - opacity))
}

/// An error that says what to do, if OpenSlide is not installed.
pub fn check_library() -> Result<()> {
    OpenSlide::get().map(drop)
}

/// The functions of libopenslide that are used (openslide.h, the same in 3.4 and 4.0).
struct OpenSlide {
    open: unsafe extern "C" fn(*const c_char) -> *mut c_void,
    close: unsafe extern "C" fn(*mut c_void),
    get_error: unsafe extern "C" fn(*mut c_void) -> *const c_char,
    get_level_count: unsafe extern "C" fn(*mut c_void) -> i32,
    get_level_dimensions: unsafe extern "C" fn(*mut c_void, i32, *mut i64, *mut i64),
    get_level_downsample: unsafe extern "C" fn(*mut c_void, i32) -> f64,
    get_best_level_for_downsample: unsafe extern "C" fn(*mut c_void, f64) -> i32,
    get_property_value: unsafe extern "C" fn(*mut c_void, *const c_char) -> *const c_char,
    read_region: unsafe extern "C" fn(*mut c_void, *mut u32, i64, i64, i32, i64, i64),
    _library: Library,
}

/// Names of the library, of OpenSlide 4 and 3, on Linux and macOS.
const NAMES: [&str; 3] = ["libopenslide.so.1", "libopenslide.so.0", "libopenslide.1.dylib"];

/// A library to use instead.
const VARIABLE: &str = "CROSSFUSION_OPENSLIDE";

impl OpenSlide {
    /// Loads the library once.
    fn get() -> Result<&'static Self> {
        static LOADED: OnceLock<Result<OpenSlide, String>> = OnceLock::new();
        LOADED.get_or_init(Self::load).as_ref().map_err(|e| Error::Device(e.clone()))
    }

    /// From $CROSSFUSION_OPENSLIDE, or else the system's, or else that of Python's openslide_bin.
    fn load() -> Result<Self, String> {
        if let Some(path) = std::env::var_os(VARIABLE) {
            // SAFETY: loading OpenSlide runs nothing but its libraries' initialisers.
            let library = unsafe { Library::new(&path) };
            let named = |what: &str, e| format!("{VARIABLE}: {} {what}: {}", path.display(), reason(&e));
            let library = library.map_err(|e| named("cannot be loaded", e))?;
            return Self::new(library).map_err(|e| named("is not OpenSlide", e));
        }
        // SAFETY: as above.
        let load = |name: &Path| unsafe { Library::new(name) }.ok();
        let of_system = || NAMES.iter().find_map(|name| load(Path::new(name)));
        let of_python = || {
            let folder = package_folder("openslide_bin")?;
            NAMES.iter().find_map(|name| load(&folder.join(name)))
        };
        let library = of_system().or_else(of_python).ok_or_else(|| {
            format!(
                "OpenSlide is not installed: `apt-get install libopenslide0`, or `pip install openslide-bin` for the \
                 python3 on the path, or {VARIABLE}=/path/to/libopenslide.so"
            )
        })?;
        Self::new(library).map_err(|e| format!("the OpenSlide that is installed is not usable: {}", reason(&e)))
    }

    fn new(library: Library) -> Result<Self, libloading::Error> {
        // SAFETY: the types are those of openslide.h, and the library lives as long as the
        // pointers.
        unsafe {
            Ok(Self {
                open: *library.get(b"openslide_open\0")?,
                close: *library.get(b"openslide_close\0")?,
                get_error: *library.get(b"openslide_get_error\0")?,
                get_level_count: *library.get(b"openslide_get_level_count\0")?,
                get_level_dimensions: *library.get(b"openslide_get_level_dimensions\0")?,
                get_level_downsample: *library.get(b"openslide_get_level_downsample\0")?,
                get_best_level_for_downsample: *library.get(b"openslide_get_best_level_for_downsample\0")?,
                get_property_value: *library.get(b"openslide_get_property_value\0")?,
                read_region: *library.get(b"openslide_read_region\0")?,
                _library: library,
            })
        }
    }
}

/// What libloading knows of an error: its own words are behind it.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or(error.to_string(), ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opacity_is_undone_as_openslide_python_does_it() {
        assert_eq!(without_opacity(0xff01_02fe), [1, 2, 254]);
        assert_eq!(without_opacity(0x0000_0000), [0, 0, 0]);
        assert_eq!(without_opacity(0x8040_2010), [127, 63, 31]);
    }

    #[test]
    fn what_is_transparent_is_white_to_look_at() {
        assert_eq!(on_white(0xff01_02fe), [1, 2, 254]);
        assert_eq!(on_white(0x0000_0000), [255; 3]);
        assert_eq!(on_white(0x8040_2010), [0xbf, 0x9f, 0x8f]);
    }
}

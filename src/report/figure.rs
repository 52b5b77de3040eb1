//! A figure as SVG text: for the page (colours from the page's scheme), for a file of its own, and
//! as PNG.
//!
//! Shapes carry classes, never colours; `figure.css` gives the classes their look through the
//! variables of [`PALETTE`].

use std::{fmt::Write, sync::Arc};

use resvg::{tiny_skia, usvg};

use crate::{Error, Result};

const STYLE: &str = include_str!("figure.css");
/// Subsets of Inter, so that a PNG has its text on a machine without fonts. Licence: fonts/OFL.txt.
const FONTS: [&[u8]; 2] = [include_bytes!("fonts/Inter-Regular.otf"), include_bytes!("fonts/Inter-SemiBold.otf")];

/// Variable, its colour on light ground, on dark ground. The groups' blue and orange differ in hue
/// for every colour vision and in lightness for a print in grey.
pub const PALETTE: [(&str, &str, &str); 12] = [
    ("--paper", "#ffffff", "#171b21"),
    ("--ground", "#f4f5f7", "#0f1216"),
    ("--ink", "#1a1f27", "#e8ebf0"),
    ("--muted", "#5c6572", "#9aa4b2"),
    ("--rule", "#e3e6ea", "#2b313a"),
    ("--axis", "#8b94a1", "#66707e"),
    ("--accent", "#14508f", "#7db8f7"),
    ("--warn", "#fdf3e1", "#33291a"),
    ("--c0", "#14508f", "#6cb0f5"),
    ("--c1", "#d96a00", "#ff9d4a"),
    ("--c2", "#2b8a6b", "#5fd0a8"),
    ("--c3", "#8a4fa8", "#cf9df0"),
];
/// What a figure is drawn for. The page holds both, and shows what fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Screen {
    /// A page, 854 pixels wide, and the files.
    Page,
    /// 400 pixels wide.
    Phone,
}

impl Screen {
    /// One of two numbers.
    pub fn pick<T>(self, page: T, phone: T) -> T {
        match self {
            Self::Page => page,
            Self::Phone => phone,
        }
    }

    /// Of a figure that fills it, in CSS pixels.
    pub fn width(self) -> f64 {
        self.pick(854.0, 400.0)
    }
}

/// Classes c0, c1, ...
pub const SERIES: usize = 4;

/// Where text stands on its point.
#[derive(Clone, Copy)]
pub enum Anchor {
    /// It begins there.
    Start,
    /// Its middle is there.
    Middle,
    /// It ends there.
    End,
}

/// A drawing as SVG text: shapes lie over those drawn before, and places are CSS pixels from the
/// upper left corner.
pub struct Figure {
    width: f64,
    height: f64,
    /// What a screen reader says.
    label: String,
    body: String,
}

impl Figure {
    /// Size in CSS pixels.
    pub fn new(width: f64, height: f64, label: impl Into<String>) -> Self {
        Self { width, height, label: label.into(), body: String::new() }
    }

    /// Draws `inside` with a class of its own, which sets the colour of curves, bands and swatches.
    pub fn group(&mut self, class: &str, inside: impl FnOnce(&mut Self)) {
        let _ = write!(self.body, r#"<g class="{class}">"#);
        inside(self);
        self.body.push_str("</g>\n");
    }

    /// Draws the path data `d` of SVG; nothing where that is empty.
    pub fn path(&mut self, class: &str, d: &str) {
        if !d.is_empty() {
            let _ = writeln!(self.body, r#"<path class="{class}" d="{d}"/>"#);
        }
    }

    /// Draws a straight line from one point to another.
    pub fn line(&mut self, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
        self.path(class, &format!("M{x1:.1} {y1:.1}L{x2:.1} {y2:.1}"));
    }

    /// Draws a rectangle whose upper left corner is the point.
    pub fn rect(&mut self, class: &str, (x, y): (f64, f64), width: f64, height: f64) {
        let _ = writeln!(
            self.body,
            r#"<rect class="{class}" x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}"/>"#
        );
    }

    /// Draws a circle around the point.
    pub fn circle(&mut self, class: &str, (x, y): (f64, f64), radius: f64) {
        let _ = writeln!(self.body, r#"<circle class="{class}" cx="{x:.1}" cy="{y:.1}" r="{radius:.1}"/>"#);
    }

    /// Writes a line of text, on a baseline through the point.
    pub fn text(&mut self, class: &str, anchor: Anchor, at: (f64, f64), text: &str) {
        self.texts(anchor, at, &[(class, text)]);
    }

    /// Pieces of one line of text, each with its class.
    pub fn texts(&mut self, anchor: Anchor, (x, y): (f64, f64), pieces: &[(&str, &str)]) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let _ = write!(self.body, r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">"#);
        for (i, (class, text)) in pieces.iter().enumerate() {
            let gap = if i > 0 { r#" dx="9""# } else { "" };
            let _ = write!(self.body, r#"<tspan class="{class}"{gap}>{}</tspan>"#, escape(text));
        }
        self.body.push_str("</text>\n");
    }

    /// Read from below to above, centred on the point.
    pub fn vertical_text(&mut self, class: &str, (x, y): (f64, f64), text: &str) {
        let _ = writeln!(
            self.body,
            r#"<text class="{class}" text-anchor="middle" transform="translate({x:.1} {y:.1}) rotate(-90)">{}</text>"#,
            escape(text)
        );
    }

    /// For the page, which holds [`page_style`]; `class` says on which screens.
    pub fn inline(&self, class: &str) -> String {
        let (width, height, label) = (self.width, self.height, escape(&self.label));
        format!(
            "<svg class=\"plot {class}\" viewBox=\"0 0 {width} {height}\" style=\"max-width:{width}px\" role=\"img\" \
             aria-label=\"{label}\">\n{}</svg>",
            self.body
        )
    }

    /// A file of its own: dark on white.
    pub fn standalone(&self) -> String {
        let (width, height, label) = (self.width, self.height, escape(&self.label));
        let style =
            PALETTE.iter().fold(STYLE.to_string(), |css, (name, light, _)| css.replace(&format!("var({name})"), light));
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"plot\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{label}\">\n<style>\n{style}</style>\n\
             <rect class=\"paper\" width=\"{width}\" height=\"{height}\"/>\n{}</svg>\n",
            self.body
        )
    }

    /// The standalone figure with `scale` pixels a CSS pixel.
    pub fn png(&self, scale: f64) -> Result<Vec<u8>> {
        let failed = |reason: String| Error::Device(format!("rendering the PNG of \"{}\": {reason}", self.label));
        let mut fonts = usvg::fontdb::Database::new();
        FONTS.iter().for_each(|font| fonts.load_font_data(font.to_vec()));
        fonts.set_sans_serif_family("Inter");
        let options = usvg::Options { fontdb: Arc::new(fonts), font_family: "Inter".into(), ..Default::default() };
        let tree = usvg::Tree::from_str(&self.standalone(), &options).map_err(|e| failed(e.to_string()))?;
        let (width, height) = ((self.width * scale).ceil() as u32, (self.height * scale).ceil() as u32);
        let mut pixels = tiny_skia::Pixmap::new(width, height)
            .ok_or_else(|| failed(format!("{width} x {height} pixels cannot be held")))?;
        resvg::render(&tree, tiny_skia::Transform::from_scale(scale as f32, scale as f32), &mut pixels.as_mut());
        pixels.encode_png().map_err(|e| failed(e.to_string()))
    }
}

/// The style of inline figures, and the palette for light and dark.
pub fn page_style() -> String {
    let colours = |which: fn(&(&str, &str, &str)) -> String| PALETTE.iter().map(which).collect::<String>();
    let (light, dark) =
        (colours(|(v, light, _)| format!("{v}:{light};")), colours(|(v, _, dark)| format!("{v}:{dark};")));
    format!(
        ":root{{color-scheme:light dark;{light}}}\n\
         @media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{STYLE}"
    )
}

/// Text for XML and HTML, attributes included. Control characters, which XML cannot hold, become
/// U+FFFD.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\n' | '\t' => escaped.push(c),
            c if c.is_control() || ('\u{fffe}'..='\u{ffff}').contains(&c) => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

/// A linear map from data to pixels.
#[derive(Clone, Copy)]
pub struct Axis {
    from: f64,
    to: f64,
    start: f64,
    end: f64,
}

impl Axis {
    /// `from` lies on pixel `start`, `to` on pixel `end`. An empty range is widened to 1.
    pub fn new((from, to): (f64, f64), (start, end): (f64, f64)) -> Self {
        let to = if to > from { to } else { from + 1.0 };
        Self { from, to, start, end }
    }

    /// The pixel of a value; beyond the ends for one that lies there.
    pub fn at(&self, value: f64) -> f64 {
        self.start + (value - self.from) / (self.to - self.from) * (self.end - self.start)
    }

    /// Multiples of `step` on the axis.
    pub fn ticks(&self, step: f64) -> Vec<f64> {
        let (first, last) = ((self.from / step - 1e-9).ceil() as i64, (self.to / step + 1e-9).floor() as i64);
        (first..=last).map(|i| i as f64 * step).collect()
    }
}

/// The least of 1, 2, 5, 10, ... (times a power of ten) that cuts `span` into at most `most` parts.
pub fn nice_step(span: f64, most: usize) -> f64 {
    let least = (span / most as f64).max(f64::MIN_POSITIVE);
    let power = 10f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|&step| step >= least * (1.0 - 1e-9)).unwrap_or(least)
}

/// A tick's label with as many decimals as its step needs, and a real minus sign.
pub fn tick_label(value: f64, step: f64) -> String {
    if value.abs() >= 1e7 {
        return format!("{value:.0e}").replace('-', "\u{2212}");
    }
    let decimals = (-(step.log10() + 1e-9).floor()).max(0.0) as usize;
    let value = if value.abs() < step * 1e-6 { 0.0 } else { value };
    format!("{value:.decimals$}").replace('-', "\u{2212}")
}

/// Spaces between ticks on a time axis that a person reads as months.
const MONTHS: [f64; 11] = [1.0, 2.0, 3.0, 6.0, 12.0, 24.0, 36.0, 60.0, 120.0, 240.0, 600.0];

/// Months between the ticks of an axis of this length.
pub fn month_step(span: f64) -> f64 {
    MONTHS.into_iter().find(|step| span / step <= 9.0).unwrap_or(nice_step(span, 8))
}

/// A line through points.
pub fn path_through(points: impl Iterator<Item = (f64, f64)>) -> String {
    let piece = |(i, (x, y))| format!("{}{x:.1} {y:.1}", if i == 0 { 'M' } else { 'L' });
    points.enumerate().map(piece).collect()
}

//! Every drawn path against its CSV: figures are rasterised, and the pixels along what the table
//! says have its colour, and those beside it have not. Where a number lies in the picture is read
//! off the labels of the axes.

use super::{cohort, epochs, summary};
use crossfusion::report::{
    figure::{Figure, PALETTE, Screen},
    km,
    plots::{Plot, Plots},
};
use resvg::{tiny_skia::Pixmap, usvg::roxmltree};

/// Pixels of the PNG for one of the SVG.
const SCALE: f64 = 4.0;
const CURVE: f64 = 1.0;
const PALE: f64 = 0.45;
const BAND: f64 = 0.14;
const FAINT: f64 = 0.32;

struct Text {
    x: f64,
    y: f64,
    anchor: String,
    class: String,
    text: String,
}

struct Picture {
    pixels: Pixmap,
    texts: Vec<Text>,
}

/// A line from data to the SVG's pixels.
#[derive(Clone, Copy)]
struct Scale {
    slope: f64,
    offset: f64,
}

impl Scale {
    fn at(self, value: f64) -> f64 {
        self.offset + self.slope * value
    }

    fn back(self, pixel: f64) -> f64 {
        (pixel - self.offset) / self.slope
    }
}

impl Picture {
    fn new(figure: &Figure) -> Self {
        let svg = figure.standalone();
        let xml = roxmltree::Document::parse(&svg).unwrap();
        let text = |node: roxmltree::Node| {
            let number = |name: &str| node.attribute(name).and_then(|value| value.parse().ok());
            Some(Text {
                x: number("x")?,
                y: number("y")?,
                anchor: node.attribute("text-anchor")?.into(),
                class: node.first_element_child()?.attribute("class")?.into(),
                text: node
                    .descendants()
                    .filter(|n| n.is_text())
                    .filter_map(|n| n.text())
                    .collect::<String>()
                    .replace('\u{2212}', "-"),
            })
        };
        let texts = xml.descendants().filter(|node| node.has_tag_name("text")).filter_map(text).collect();
        Self { pixels: Pixmap::decode_png(&figure.png(SCALE).unwrap()).unwrap(), texts }
    }

    /// The numbers of an axis's ticks and where they stand.
    fn axis(&self, across: bool, within: impl Fn(&Text) -> bool) -> Scale {
        let tick =
            |text: &&Text| text.anchor == if across { "middle" } else { "end" } && text.class.starts_with("muted");
        let ticks = self.texts.iter().filter(tick).filter(|text| within(text));
        let ticks: Vec<(f64, f64)> = ticks
            .filter_map(|text| Some((text.text.parse().ok()?, if across { text.x } else { text.y - 4.0 })))
            .collect();
        let ends =
            |pick: fn(&(f64, f64), &(f64, f64)) -> std::cmp::Ordering| ticks.iter().copied().min_by(pick).unwrap();
        let ((low, start), (high, end)) = (ends(|a, b| a.0.total_cmp(&b.0)), ends(|a, b| b.0.total_cmp(&a.0)));
        assert!(high > low, "an axis has two ticks");
        let slope = (end - start) / (high - low);
        Scale { slope, offset: start - slope * low }
    }

    fn colour(&self, (x, y): (f64, f64)) -> [f64; 3] {
        let pixel = self.pixels.pixel((x * SCALE) as u32, (y * SCALE) as u32).unwrap().demultiply();
        [pixel.red(), pixel.green(), pixel.blue()].map(f64::from)
    }

    /// Whether the pixel has `paint` at `opacity` on white.
    fn is(&self, at: (f64, f64), paint: &str, opacity: f64) -> bool {
        let colour = self.colour(at);
        let want = of_palette(paint).map(|c| 255.0 + (c - 255.0) * opacity);
        colour.iter().zip(want).all(|(got, want)| (got - want).abs() <= 6.0)
    }

    #[track_caller]
    fn painted(&self, at: (f64, f64), paint: &str, opacity: f64, what: &str) {
        let (got, want) = (self.colour(at), of_palette(paint));
        assert!(self.is(at, paint, opacity), "{what}: the pixel at {at:?} is {got:?}, expected {want:?} at {opacity}");
    }

    #[track_caller]
    fn bare(&self, at: (f64, f64), paint: &str, opacity: f64, what: &str) {
        assert!(!self.is(at, paint, opacity), "{what}: the pixel at {at:?} is painted");
    }

    #[track_caller]
    fn white(&self, at: (f64, f64), what: &str) {
        assert!(self.is(at, "--paper", 1.0), "{what}: the pixel at {at:?} is {:?}, expected white", self.colour(at));
    }
}

fn of_palette(name: &str) -> [f64; 3] {
    let (_, light, _) = PALETTE.iter().find(|(variable, ..)| *variable == name).unwrap();
    [1, 3, 5].map(|i| f64::from(u8::from_str_radix(&light[i..i + 2], 16).unwrap()))
}

/// The cells of a CSV below its head, None where blank or no number.
fn cells(csv: &[u8]) -> Vec<Vec<Option<f64>>> {
    let mut table = csv::Reader::from_reader(csv);
    table.records().map(|row| row.unwrap().iter().map(|cell| cell.parse().ok()).collect()).collect()
}

fn near(value: f64, others: impl IntoIterator<Item = f64>, distance: f64) -> bool {
    others.into_iter().any(|other| (value - other).abs() < distance)
}

/// A late first event.
const LATE: ([f64; 4], [bool; 4]) = ([30.0, 40.0, 50.0, 60.0], [true, false, true, true]);

fn group(time: &[f64], event: &[bool]) -> km::Group {
    km::Group { label: "All".into(), time: time.into(), event: event.into() }
}

fn alone(group: &km::Group, screen: Screen) -> Figure {
    km::figure(std::slice::from_ref(group), &km::Tests::default(), screen).unwrap()
}

/// Curve, band and censor marks of one group alone, pixel column by pixel column.
fn kaplan_meier(group: &km::Group, figure: &Figure) -> [usize; 4] {
    let picture = Picture::new(figure);
    let (x, y) = (picture.axis(true, |_| true), picture.axis(false, |_| true));
    // time, at risk, events, censored, survival, lower, upper
    let rows: Vec<Vec<Option<f64>>> = cells(&km::csv(std::slice::from_ref(group)).unwrap());
    let rows: Vec<[Option<f64>; 7]> = rows.iter().map(|row| std::array::from_fn(|i| row[i + 1])).collect();
    let time = |row: &[Option<f64>; 7]| row[0].unwrap();
    let of = |column: usize| rows.iter().filter(move |row| row[column].unwrap() > 0.0).map(time);
    // ten at risk or more, of twenty or more
    let end = match group.time.len() {
        0..20 => rows.last().map(time).unwrap(),
        _ => rows.iter().rfind(|row| row[1].unwrap() >= 10.0).map(time).unwrap(),
    };
    let grid = [0.0, 0.25, 0.5, 0.75, 1.0].map(|s| y.at(s));
    let mut seen = [0; 4];
    let mut pixel = x.at(0.0) + 1.0;
    while pixel < x.at(end) - 1.0 {
        let t = x.back(pixel);
        pixel += 0.4;
        let row = rows.iter().rfind(|row| time(row) <= t);
        let survival = row.map_or(1.0, |row| row[4].unwrap());
        let here = x.at(t);
        if near(here, of(2).chain(of(3)).map(|time| x.at(time)), 3.0) {
            continue; // a step or a mark
        }
        let level = y.at(survival);
        picture.painted((here, level), "--c0", CURVE, "curve");
        for away in [-4.0, 4.0] {
            picture.bare((here, level + away), "--c0", CURVE, "beside the curve");
        }
        seen[0] += 1;
        let (lower, upper) = match row {
            None => (Some(1.0), Some(1.0)),
            Some(row) => (row[5], row[6]),
        };
        for step in 1..100 {
            let s = 0.01 * f64::from(step);
            let down = y.at(s);
            let edges = lower.into_iter().chain(upper).map(|limit| y.at(limit));
            if near(down, grid.into_iter().chain(edges).chain([level]), 2.5) {
                continue;
            }
            let inside = lower.zip(upper).is_some_and(|(lower, upper)| lower < s && s < upper);
            match inside {
                true => picture.painted((here, down), "--c0", BAND, "band"),
                false => picture.white((here, down), "beside the band"),
            }
            seen[1 + usize::from(inside)] += 1;
        }
    }
    for row in rows.iter().filter(|row| row[3].unwrap() > 0.0 && time(row) <= end) {
        let (here, level) = (x.at(time(row)), y.at(row[4].unwrap()));
        for away in [-3.0, 3.0] {
            picture.painted((here, level + away), "--c0", CURVE, "censor mark");
            if !near(here, of(2).chain(of(3)).filter(|&t| t != time(row)).map(|t| x.at(t)), 6.0) {
                for aside in [-2.5, 2.5] {
                    picture.bare((here + aside, level + away), "--c0", CURVE, "beside a mark");
                }
            }
        }
        seen[3] += 1;
    }
    seen
}

#[test]
fn kaplan_meier_figures_are_their_tables() {
    let mut marks = 0;
    for n in [30, 120] {
        let predictions = cohort(n, 1);
        for groups in summary(&predictions, 1).risk_groups.iter().map(|grouping| grouping.groups(&predictions)) {
            for one in groups {
                for screen in [Screen::Page, Screen::Phone] {
                    let seen = kaplan_meier(&one, &alone(&one, screen));
                    assert!(seen[..3].iter().all(|&n| n > 5), "{seen:?}");
                    marks += seen[3];
                }
            }
        }
    }
    assert!(marks > 100, "{marks}");
    // A late first event, all dead at the end, nobody with an event, one patient.
    let on_page = |time: &[f64], event: &[bool]| {
        let group = group(time, event);
        kaplan_meier(&group, &alone(&group, Screen::Page))
    };
    let seen = on_page(&LATE.0, &LATE.1);
    assert!(seen[0] > 500 && seen[1] > 10_000, "{seen:?}");
    on_page(&[3.0, 40.0, 50.0], &[false; 3]);
    on_page(&[7.0], &[true]);
}

/// What was drawn once: a band that runs straight from 1 at time 0 to the first event's lower
/// limit.
#[test]
#[should_panic(expected = "beside the band")]
fn a_wedge_before_the_first_event_is_noticed() {
    let late = group(&LATE.0, &LATE.1);
    let mut figure = alone(&late, Screen::Page);
    let picture = Picture::new(&figure);
    let (x, y) = (picture.axis(true, |_| true), picture.axis(false, |_| true));
    let first = &cells(&km::csv(std::slice::from_ref(&late)).unwrap())[0];
    let (time, lower) = (x.at(first[1].unwrap()), y.at(first[6].unwrap()));
    let wedge = format!("M{:.1} {:.1}H{time:.1}V{lower:.1}Z", x.at(0.0), y.at(1.0));
    figure.group("c0", |figure| figure.path("band", &wedge));
    kaplan_meier(&late, &figure);
}

/// With two groups the curves keep their colours, pale where fewer than ten are at risk, and
/// nothing is drawn beyond the axis.
#[test]
fn curves_of_two_groups_have_their_colours() {
    let predictions = cohort(160, 2);
    let summary = summary(&predictions, 2);
    let plots = Plots::new(&summary, &[]).unwrap();
    let plot = &plots.survival[0];
    let picture = Picture::new(&plot.figure);
    let (x, y) = (picture.axis(true, |text| text.class == "muted"), picture.axis(false, |_| true));
    let mut table = csv::Reader::from_reader(&plot.csv[..]);
    let rows: Vec<csv::StringRecord> = table.records().map(Result::unwrap).collect();
    let groups = ["Low risk", "High risk"].map(|label| {
        let of = rows.iter().filter(|row| &row[0] == label);
        // time, at risk, survival
        of.map(|row| [1, 2, 5].map(|i| row[i].parse::<f64>().unwrap())).collect::<Vec<_>>()
    });
    let mut times: Vec<f64> = predictions.iter().map(|p| p.time).collect();
    times.sort_by(|a, b| b.total_cmp(a));
    let at = |group: &[[f64; 3]], t: f64| group.iter().rfind(|row| row[0] <= t).map_or(1.0, |row| row[2]);
    let mut pale = 0;
    for (i, group) in groups.iter().enumerate() {
        let paint = ["--c0", "--c1"][i];
        let solid = group.iter().rfind(|row| row[1] >= 10.0).unwrap()[0];
        let last = group.last().unwrap()[0];
        let mut pixel = x.at(0.0) + 2.0;
        while pixel < x.at(times[9]) - 2.0 {
            let t = x.back(pixel);
            pixel += 1.0;
            let (level, other) = (y.at(at(group, t)), y.at(at(&groups[1 - i], t)));
            let steps = groups.iter().flatten().map(|row| x.at(row[0]));
            if near(pixel - 1.0, steps.chain([x.at(last)]), 2.5) || near(level, [other], 9.0) {
                continue;
            }
            if t < solid {
                picture.painted((x.at(t), level), paint, CURVE, "curve");
            } else if t < last {
                picture.bare((x.at(t), level), paint, CURVE, "the end of a curve is pale");
                pale += 1;
            } else {
                picture.bare((x.at(t), level), paint, PALE, "beyond the last patient");
            }
        }
    }
    assert!(pale > 0, "a pale end is seen");
    for s in 1..100 {
        picture.white((x.at(times[9]) + 3.0, y.at(0.01 * f64::from(s))), "beyond the axis");
    }
}

fn plots() -> (Plots, f64) {
    let predictions = cohort(160, 2);
    let summary = summary(&predictions, 2);
    (Plots::new(&summary, &epochs(2)).unwrap(), summary.median_risk)
}

fn both(plot: &Plot) -> [Picture; 2] {
    [Picture::new(&plot.figure), Picture::new(plot.phone.as_ref().unwrap())]
}

#[test]
fn the_auc_figure_is_its_table() {
    let plot = plots().0.auc.unwrap();
    let rows = cells(&plot.csv);
    for picture in both(&plot) {
        let (x, y) = (picture.axis(true, |_| true), picture.axis(false, |_| true));
        let grid: Vec<f64> = (0..=20).map(|i| y.at(f64::from(i) / 20.0)).collect();
        let value = |row: &[Option<f64>], column: usize| y.at(row[column].unwrap());
        for pair in rows.windows(2) {
            let (a, b) = (&pair[0], &pair[1]);
            picture.painted((x.at(a[0].unwrap()), value(a, 1)), "--c0", CURVE, "point");
            let here = 0.5 * (x.at(a[0].unwrap()) + x.at(b[0].unwrap()));
            let [level, lower, upper] = [1, 2, 3].map(|column| 0.5 * (value(a, column) + value(b, column)));
            picture.painted((here, level), "--c0", CURVE, "curve");
            for (down, inside) in [(lower - 3.0, true), (lower + 3.0, false), (upper + 3.0, true), (upper - 3.0, false)]
            {
                if near(down, grid.iter().copied().chain([level]), 2.5) {
                    continue;
                }
                match inside {
                    true => picture.painted((here, down), "--c0", BAND, "band"),
                    false => picture.white((here, down), "beside the band"),
                }
            }
        }
    }
}

#[test]
fn the_calibration_figure_is_its_table() {
    let plot = plots().0.calibration.unwrap();
    let rows = cells(&plot.csv);
    for (picture, columns) in both(&plot).into_iter().zip([3, 1]) {
        for (panel, points) in rows.chunk_by(|a, b| a[0] == b[0]).enumerate() {
            // a panel's ticks lie in its part of the picture
            let (width, height) =
                (f64::from(picture.pixels.width()) / SCALE, f64::from(picture.pixels.height()) / SCALE);
            let (across, down) = if columns == 3 { (width / 3.0, height) } else { (width, height / 3.0) };
            let inside = |text: &Text| {
                let (left, top) = if columns == 3 { (panel as f64, 0.0) } else { (0.0, panel as f64) };
                (left * across..(left + 1.0) * across).contains(&text.x)
                    && (top * down..(top + 1.0) * down).contains(&text.y)
            };
            let (x, y) = (picture.axis(true, inside), picture.axis(false, inside));
            for point in points {
                let here = x.at(point[4].unwrap());
                picture.painted((here, y.at(point[5].unwrap())), "--c0", CURVE, "point");
                let (lower, upper) = (y.at(point[6].unwrap()), y.at(point[7].unwrap()));
                picture.painted((here, lower - 1.0), "--c0", CURVE, "lower limit");
                picture.painted((here, upper + 1.0), "--c0", CURVE, "upper limit");
                let circle = y.at(point[5].unwrap());
                for (beyond, what) in [(lower + 2.0, "below the lower limit"), (upper - 2.0, "above the upper limit")] {
                    if !near(beyond, [circle], 5.0) {
                        picture.bare((here, beyond), "--c0", CURVE, what);
                    }
                }
            }
        }
    }
}

#[test]
fn the_forest_is_its_table() {
    let plot = plots().0.c_index;
    let rows = cells(&plot.csv);
    for (picture, numbers) in both(&plot).into_iter().zip([600.0, 230.0]) {
        let x = picture.axis(true, |_| true);
        let centres =
            picture.texts.iter().filter(|text| text.anchor == "start" && text.x > numbers).map(|text| text.y - 4.0);
        let centres: Vec<f64> = centres.collect();
        assert_eq!(centres.len(), rows.len());
        for (row, centre) in rows.iter().zip(centres) {
            picture.painted((x.at(row[2].unwrap()), centre), "--c0", CURVE, "estimate");
            let Some((lower, upper)) = row[3].zip(row[4]) else { continue };
            let (lower, upper) = (x.at(lower), x.at(upper));
            picture.painted((lower + 1.0, centre), "--c0", CURVE, "lower end");
            picture.painted((upper - 1.0, centre), "--c0", CURVE, "upper end");
            picture.bare((lower - 2.0, centre), "--c0", CURVE, "before the lower end");
            picture.bare((upper + 2.0, centre), "--c0", CURVE, "beyond the upper end");
        }
    }
}

#[test]
fn the_histogram_is_its_table() {
    let (plots, cut) = plots();
    let plot = plots.risk.unwrap();
    for picture in both(&plot) {
        let (x, y) = (picture.axis(true, |text| text.y > 100.0), picture.axis(false, |_| true));
        for row in cells(&plot.csv) {
            let [from, to, events, censored] = std::array::from_fn(|i| row[i].unwrap());
            let paint = if 0.5 * (from + to) < cut { "--c0" } else { "--c1" };
            let here = x.at(0.5 * (from + to));
            if events > 0.0 {
                picture.painted((here, y.at(0.5 * events)), paint, CURVE, "events");
                picture.painted((here, y.at(events) + 0.7), paint, CURVE, "the top of the events");
            }
            if censored > 0.0 {
                picture.painted((here, y.at(events) - 1.0), paint, FAINT, "the foot of the censored");
                picture.painted((here, y.at(events + censored) + 0.7), paint, FAINT, "the top of the censored");
            }
            picture.bare((here, y.at(events + censored) - 1.0), paint, FAINT, "above the bar");
            picture.bare((here, y.at(events + censored) - 1.0), paint, CURVE, "above the bar");
        }
    }
}

#[test]
fn training_curves_are_their_tables() {
    let mut seen = 0;
    for plot in plots().0.training {
        let picture = Picture::new(&plot.figure);
        let x = picture.axis(true, |_| true);
        let rows = cells(&plot.csv);
        for panel in 0..2 {
            let y = picture.axis(false, |text| (text.y > 160.0) == (panel == 1));
            for pair in rows.windows(2) {
                let middle = |column: usize| 0.5 * (y.at(pair[0][column].unwrap()) + y.at(pair[1][column].unwrap()));
                let here = 0.5 * (x.at(pair[0][1].unwrap()) + x.at(pair[1][1].unwrap()));
                let [train, validation] = [middle(2 + 2 * panel), middle(3 + 2 * panel)];
                picture.painted((here, validation), "--c0", CURVE, "validation");
                if !near(train, [validation], 6.0) {
                    picture.painted((here, train), "--axis", CURVE, "training");
                    let between = 0.5 * (train + validation);
                    picture.bare((here, between), "--c0", CURVE, "between the curves");
                    seen += 1;
                }
            }
            let best = rows.iter().rfind(|row| row[6] == Some(1.0)).unwrap();
            picture.painted(
                (x.at(best[1].unwrap()) + 2.0, y.at(best[3 + 2 * panel].unwrap())),
                "--c0",
                CURVE,
                "best epoch",
            );
        }
    }
    assert!(seen > 50, "{seen}");
}

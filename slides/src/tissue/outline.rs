//! The borders of the white areas of a mask and of the holes in them, by the border following of
//! Suzuki and Abe (1985).

use super::{Plane, Point};

/// A white area (pixels that touch by side or corner) and its holes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outline {
    /// The area's outermost pixels, in order; neighbours touch.
    pub border: Vec<Point>,
    /// The white pixels around each hole, likewise.
    pub holes: Vec<Vec<Point>>,
}

/// The steps to a pixel's neighbours in `(x, y)`, from the right over the top.
const STEPS: [(i32, i32); 8] = [(1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1)];
const RIGHT: usize = 0;
const LEFT: usize = 4;

/// What OpenCV's `findContours(mask, RETR_CCOMP, CHAIN_APPROX_NONE)` finds, in its order: the
/// areas, and the holes of each, from the last that a scan row by row meets to the first.
pub fn outlines(mask: &Plane) -> Vec<Outline> {
    let mut scan = Scan::new(mask);
    let mut outlines: Vec<Outline> = Vec::new();
    // of each border, from label 2 on: the outline that it belongs to
    let mut owners: Vec<usize> = Vec::new();
    for y in 1..=mask.height {
        let row = y * scan.width;
        // the label before, and where in this row a border was met last
        let (mut before, mut met) = (0, row);
        for at in row + 1..row + scan.width {
            let pixel = scan.labels[at];
            if pixel == before {
                continue;
            }
            let label = owners.len() as i32 + 2;
            if before == 0 && pixel == 1 {
                owners.push(outlines.len());
                outlines.push(Outline { border: scan.follow(at, LEFT, label), holes: Vec::new() });
                met = at;
            } else if pixel == 0 && before >= 1 {
                // white that no border has passed lies in what the border before it bounds
                let border = if before > 1 { before } else { scan.labels[met].abs() };
                let owner = owners[border as usize - 2];
                owners.push(owner);
                let hole = scan.follow(at - 1, RIGHT, label);
                outlines[owner].holes.push(hole);
                met = at - 1;
            } else if pixel.abs() > 1 {
                met = at;
            }
            before = scan.labels[at];
        }
    }
    outlines.reverse();
    outlines.iter_mut().for_each(|outline| outline.holes.reverse());
    outlines
}

/// The mask with a black pixel around it. A label is 0 for black, 1 for white that no border has
/// passed, else the border that passed; negative where there is black on the pixel's right.
struct Scan {
    labels: Vec<i32>,
    width: usize,
    /// [`STEPS`] as differences of indices.
    steps: [isize; 8],
}

impl Scan {
    fn new(mask: &Plane) -> Self {
        let width = mask.width + 2;
        let mut labels = vec![0; width * (mask.height + 2)];
        for (row, line) in mask.pixels.chunks_exact(mask.width).zip(labels.chunks_exact_mut(width).skip(1)) {
            row.iter().zip(&mut line[1..]).for_each(|(&pixel, label)| *label = i32::from(pixel != 0));
        }
        Self { labels, width, steps: STEPS.map(|(x, y)| x as isize + y as isize * width as isize) }
    }

    fn step(&self, at: usize, direction: usize) -> usize {
        at.wrapping_add_signed(self.steps[direction % 8])
    }

    /// Follows the border through `start`, whose neighbour in direction `outside` is black, and
    /// labels it.
    fn follow(&mut self, start: usize, outside: usize, label: i32) -> Vec<Point> {
        let mut points = Vec::new();
        let mut clockwise = (1..8).map(|turn| (outside + 8 - turn) % 8);
        let Some(to_last) = clockwise.find(|&direction| self.labels[self.step(start, direction)] != 0) else {
            self.labels[start] = -label;
            return vec![self.point(start)];
        };
        let last = self.step(start, to_last);
        let (mut at, mut back) = (start, to_last);
        loop {
            // counterclockwise from where the border came from, which ends the search at the latest
            let mut direction = back + 1;
            while self.labels[self.step(at, direction)] == 0 {
                direction += 1;
            }
            // the search passed the right neighbour, so that one is black
            let passed_right = (back + 1..direction).any(|passed| passed % 8 == RIGHT);
            if passed_right {
                self.labels[at] = -label;
            } else if self.labels[at] == 1 {
                self.labels[at] = label;
            }
            points.push(self.point(at));
            let next = self.step(at, direction);
            if next == start && at == last {
                return points;
            }
            (at, back) = (next, (direction + 4) % 8);
        }
    }

    /// In pixels of the mask.
    fn point(&self, at: usize) -> Point {
        Point { x: (at % self.width) as i32 - 1, y: (at / self.width) as i32 - 1 }
    }
}

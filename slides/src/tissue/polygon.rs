//! Polygons of whole coordinates: area, bounds, and on which side of the border a point lies.

use std::cmp::Ordering;

/// A corner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// From the left.
    pub x: i32,
    /// From the top.
    pub y: i32,
}

/// Twice the area of the polygon with these corners, so that it is whole: `2 * cv2.contourArea`.
pub fn twice_area(corners: &[Point]) -> i64 {
    edges(corners).map(|[a, b]| i64::from(a.x) * i64::from(b.y) - i64::from(a.y) * i64::from(b.x)).sum::<i64>().abs()
}

/// Each corner with the next, the last with the first.
fn edges(corners: &[Point]) -> impl Iterator<Item = [Point; 2]> {
    corners.iter().zip(corners.iter().cycle().skip(1)).map(|(&a, &b)| [a, b])
}

/// A polygon in which points are looked up.
pub struct Polygon {
    /// The smallest and the largest coordinates of its corners.
    pub bounds: [Point; 2],
    /// The edges that reach into each band of [`BAND`] rows, from the polygon's top.
    bands: Vec<Vec<[Point; 2]>>,
}

/// Rows of a band.
const BAND: i32 = 256;

impl Polygon {
    /// Of at least one corner.
    pub fn new(corners: &[Point]) -> Self {
        let bounds = corners.iter().fold([corners[0]; 2], |[low, high], corner| {
            let low = Point { x: low.x.min(corner.x), y: low.y.min(corner.y) };
            [low, Point { x: high.x.max(corner.x), y: high.y.max(corner.y) }]
        });
        let top = bounds[0].y;
        let band = |y: i32| ((y - top) / BAND) as usize;
        let mut bands = vec![Vec::new(); band(bounds[1].y) + 1];
        for edge in edges(corners) {
            let [a, b] = edge.map(|corner| band(corner.y));
            bands[a.min(b)..=a.max(b)].iter_mut().for_each(|band| band.push(edge));
        }
        Self { bounds, bands }
    }

    /// Where a point lies: greater than the border is inside, equal is on it, less is outside. The
    /// point is `(x / 2, y / 2)`, so that middles of pixels are whole. The sign is that of
    /// `cv2.pointPolygonTest(corners, point, False)`.
    pub fn side(&self, [x, y]: [i64; 2]) -> Ordering {
        let band = (y - 2 * i64::from(self.bounds[0].y)).div_euclid(2 * i64::from(BAND));
        let edges = usize::try_from(band).ok().and_then(|band| self.bands.get(band));
        let mut inside = false;
        for edge in edges.into_iter().flatten() {
            let [a, b] = edge.map(|corner| [2 * i64::from(corner.x) - x, 2 * i64::from(corner.y) - y]);
            let level = a[1] == 0 && b[1] == 0;
            if b == [0, 0] || (level && a[0].min(b[0]) <= 0 && a[0].max(b[0]) >= 0) {
                return Ordering::Equal;
            }
            // counted is an edge that crosses the ray to the right, its lower end included
            if (a[1] <= 0) == (b[1] <= 0) {
                continue;
            }
            let cross = a[0] * b[1] - a[1] * b[0];
            match cross.cmp(&0) {
                Ordering::Equal => return Ordering::Equal,
                // on the right of an edge that goes down, or on the left of one that goes up
                side => inside ^= (side == Ordering::Greater) == (b[1] > a[1]),
            }
        }
        if inside { Ordering::Greater } else { Ordering::Less }
    }
}

//! Which rectangles of a slide are read, so that patches of several magnifications share what is
//! decoded.

use std::collections::HashMap;

use crossfusion::model::Scale;

use crate::coordinates::Coordinates;

/// A square of a slide that is read at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// Upper left corner, in pixels of level 0.
    pub corner: [i64; 2],
    /// The level that it is read from.
    pub level: usize,
    /// Its side, in pixels of that level.
    pub size: usize,
    /// The patches in it.
    pub patches: Vec<Patch>,
}

/// A patch within a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patch {
    /// Its magnification.
    pub scale: Scale,
    /// Its number among the patches of that magnification.
    pub row: usize,
    /// Its corner in the region, in pixels of the region's level.
    pub offset: [usize; 2],
    /// Its side, in the same.
    pub size: usize,
}

/// Regions that hold every patch once. A patch that lies within a larger one of the same level is
/// read with it; that is so for nearly all, since the grids of an area begin at one corner. Only
/// level 0 is shared: on others corners may lie between pixels.
pub fn regions(patches: &[(Scale, Coordinates)]) -> Vec<Region> {
    let mut by_size: Vec<&(Scale, Coordinates)> = patches.iter().collect();
    by_size.sort_by_key(|(_, coordinates)| std::cmp::Reverse(coordinates.size));
    let mut regions: Vec<Region> = Vec::new();
    let mut larger: Vec<Places> = Vec::new();
    for &(scale, Coordinates { ref corners, level, size, .. }) in by_size {
        let mut own = Places { side: size as i64, regions: HashMap::new() };
        for (row, &corner) in corners.iter().enumerate() {
            let around =
                larger.iter().filter(|_| level == 0).find_map(|places| places.find(&regions, corner, own.side));
            let region = around.unwrap_or_else(|| {
                own.regions.entry(corner.map(|x| x.div_euclid(own.side))).or_default().push(regions.len());
                regions.push(Region { corner, level, size, patches: Vec::new() });
                regions.len() - 1
            });
            let Region { corner: from, patches, .. } = &mut regions[region];
            let offset = [0, 1].map(|axis| (corner[axis] - from[axis]) as usize);
            patches.push(Patch { scale, row, offset, size });
        }
        if level == 0 {
            larger.push(own);
        }
    }
    regions
}

/// Where regions of one size are.
struct Places {
    side: i64,
    /// Those whose corner lies in a square of this side, by the square's number in x and y.
    regions: HashMap<[i64; 2], Vec<usize>>,
}

impl Places {
    /// A region around the square of `side` at `corner`.
    fn find(&self, regions: &[Region], corner: [i64; 2], side: i64) -> Option<usize> {
        let [x, y] = corner.map(|x| x.div_euclid(self.side));
        let near = [[x, y], [x - 1, y], [x, y - 1], [x - 1, y - 1]];
        near.iter().filter_map(|square| self.regions.get(square)).flatten().copied().find(|&region| {
            let from = regions[region].corner;
            (0..2).all(|axis| from[axis] <= corner[axis] && corner[axis] + side <= from[axis] + self.side)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coordinates(size: usize, corners: &[[i64; 2]]) -> Coordinates {
        Coordinates { corners: corners.to_vec(), level: 0, size, slide: None }
    }

    #[test]
    fn patches_are_read_with_the_larger_ones_around_them() {
        let patches = [
            (Scale::X5, coordinates(1024, &[[100, 50]])),
            (Scale::X10, coordinates(512, &[[612, 562], [1124, 50]])),
            (Scale::X20, coordinates(256, &[[100, 50], [868, 818], [869, 818], [1124, 306], [-156, 50]])),
        ];
        let regions = regions(&patches);
        let corners: Vec<_> = regions.iter().map(|region| (region.corner, region.size)).collect();
        assert_eq!(corners, [([100, 50], 1024), ([1124, 50], 512), ([869, 818], 256), ([-156, 50], 256)]);
        let rows = |region: usize| -> Vec<_> {
            regions[region].patches.iter().map(|patch| (patch.scale, patch.row, patch.offset)).collect()
        };
        assert_eq!(
            rows(0),
            [(Scale::X5, 0, [0, 0]), (Scale::X10, 0, [512, 512]), (Scale::X20, 0, [0, 0]), (Scale::X20, 1, [768, 768])]
        );
        assert_eq!(rows(1), [(Scale::X10, 1, [0, 0]), (Scale::X20, 3, [0, 256])]);
    }

    #[test]
    fn other_levels_are_read_patch_by_patch() {
        let at_level_1 = |size| Coordinates { level: 1, ..coordinates(size, &[[0, 0]]) };
        let regions = regions(&[(Scale::X5, at_level_1(256)), (Scale::X10, at_level_1(128))]);
        assert_eq!(regions.len(), 2);
    }
}

//! The scales that a slide is cut at, and values by scale.

use std::fmt;

/// A magnification of a slide's patches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scale {
    /// 5x: context of the coarse stream.
    X5,
    /// 10x: the source stream.
    X10,
    /// 20x: context of the fine stream, and all that CrossFusionSingle reads.
    X20,
}

impl Scale {
    /// From the lowest magnification to the highest.
    pub const ALL: [Self; 3] = [Self::X5, Self::X10, Self::X20];

    /// As folders of features are called.
    pub fn name(self) -> &'static str {
        ["x5", "x10", "x20"][self as usize]
    }
}

impl fmt::Display for Scale {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A value for each scale that a model reads, or that a slide has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scales<V>([Option<V>; 3]);

impl<V> Default for Scales<V> {
    fn default() -> Self {
        Self([None, None, None])
    }
}

impl<V> Scales<V> {
    /// The value of a scale, if it has one.
    pub fn get(&self, scale: Scale) -> Option<&V> {
        self.0[scale as usize].as_ref()
    }

    /// Gives a scale a value, in place of the one that it may have had.
    pub fn insert(&mut self, scale: Scale, value: V) {
        self.0[scale as usize] = Some(value);
    }

    /// From the lowest magnification to the highest.
    pub fn iter(&self) -> impl Iterator<Item = (Scale, &V)> {
        Scale::ALL.into_iter().filter_map(|scale| Some((scale, self.get(scale)?)))
    }

    /// In the order of [`Self::iter`], to be changed in place.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (Scale, &mut V)> {
        Scale::ALL.into_iter().zip(&mut self.0).filter_map(|(scale, value)| Some((scale, value.as_mut()?)))
    }

    /// In the order of [`Self::iter`], without their scales.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.0.iter().flatten()
    }

    /// What `f` makes of each value, at the same scales.
    pub fn map<U>(self, mut f: impl FnMut(Scale, V) -> U) -> Scales<U> {
        self.into_iter().map(|(scale, value)| (scale, f(scale, value))).collect()
    }

    /// What `f` makes of each value, at the same scales; the first error where there is one.
    pub fn try_map<U, E>(self, mut f: impl FnMut(Scale, V) -> Result<U, E>) -> Result<Scales<U>, E> {
        self.into_iter().map(|(scale, value)| Ok((scale, f(scale, value)?))).collect()
    }

    /// The same, borrowed.
    pub fn as_ref(&self) -> Scales<&V> {
        self.iter().collect()
    }

    /// Of these scales alone.
    pub fn only(self, scales: &[Scale]) -> Self {
        self.into_iter().filter(|(scale, _)| scales.contains(scale)).collect()
    }
}

/// Of x5, x10 and x20.
impl<V> From<[V; 3]> for Scales<V> {
    fn from(values: [V; 3]) -> Self {
        Self(values.map(Some))
    }
}

impl<V> FromIterator<(Scale, V)> for Scales<V> {
    fn from_iter<I: IntoIterator<Item = (Scale, V)>>(values: I) -> Self {
        let mut scales = Self::default();
        values.into_iter().for_each(|(scale, value)| scales.insert(scale, value));
        scales
    }
}

impl<V> IntoIterator for Scales<V> {
    type Item = (Scale, V);
    type IntoIter = std::iter::FilterMap<
        std::iter::Zip<std::array::IntoIter<Scale, 3>, std::array::IntoIter<Option<V>, 3>>,
        fn((Scale, Option<V>)) -> Option<(Scale, V)>,
    >;

    fn into_iter(self) -> Self::IntoIter {
        Scale::ALL.into_iter().zip(self.0).filter_map(|(scale, value)| Some((scale, value?)))
    }
}

/// Patches of a slide, by scale.
pub type BagSizes = Scales<usize>;

impl BagSizes {
    /// Patches at all scales together.
    pub fn total(&self) -> usize {
        self.values().sum()
    }
}

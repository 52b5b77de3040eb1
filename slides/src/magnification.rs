//! How large a patch of a magnification is at level 0 of a slide.

use std::fmt;

use crossfusion::{Error, Result, model::Scale};

use crate::slide::Slide;

/// Micrometres a pixel times the power of the objective: 0.5 at 20x, as scanners have it.
const MICRONS_TIMES_POWER: f64 = 10.0;

/// Powers that scanners have. Pixel sizes of one power vary by some 15 % between makers (0.2265 to
/// 0.263 micrometres at 40x), so that a pixel size so near to one of these means it.
const POWERS: [f64; 6] = [5.0, 10.0, 20.0, 40.0, 60.0, 80.0];
const TOLERANCE: f64 = 0.15;

/// Pixel sizes that slides have. Others are resolutions for a printer, such as 72 dots an inch.
const MICRONS: std::ops::RangeInclusive<f64> = 0.05..=8.0;

/// The magnification of level 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Power {
    /// 40 of a slide at 40x.
    pub value: f64,
    /// Who says so.
    pub source: PowerSource,
}

/// What a power was taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerSource {
    /// The slide's objective power.
    Objective,
    /// The size of its pixels, since the slide has no objective power.
    Microns,
    /// The size of its pixels, which contradicts the objective power.
    MicronsNotObjective,
    /// The command line.
    Flag,
}

impl fmt::Display for PowerSource {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Objective => "objective",
            Self::Microns => "microns",
            Self::MicronsNotObjective => "microns, not objective",
            Self::Flag => "flag",
        })
    }
}

impl Power {
    /// Of a slide with these properties, unless one is `given`. None where nothing says.
    pub fn choose(objective: Option<f64>, microns: Option<f64>, given: Option<f64>) -> Option<Self> {
        let measured = microns.filter(|x| MICRONS.contains(x)).map(|x| nearest(MICRONS_TIMES_POWER / x));
        let (value, source) = match (given, objective, measured) {
            (Some(given), ..) => (given, PowerSource::Flag),
            // the powers that scanners have differ by a factor of 1.5 and more
            (None, Some(power), Some(measured)) if (power / measured).max(measured / power) > 1.4 => {
                (measured, PowerSource::MicronsNotObjective)
            }
            (None, Some(power), _) => (power, PowerSource::Objective),
            (None, None, Some(measured)) => (measured, PowerSource::Microns),
            (None, None, None) => return None,
        };
        Some(Self { value, source })
    }

    /// [`Self::choose`] for an open slide, or the error that says what to do.
    pub fn of(slide: &Slide, given: Option<f64>) -> Result<Self> {
        Self::choose(slide.objective_power(), slide.microns_per_pixel(), given).ok_or_else(|| {
            let message =
                "says neither the power of its objective nor the size of its pixels; patch it with --power 20, say";
            Error::file(slide.path(), message)
        })
    }

    /// The side at level 0, in pixels, of what is `pixels` wide at a magnification. None where
    /// level 0 has less of a magnification than that.
    pub fn at_level_0(&self, scale: Scale, pixels: usize) -> Option<i64> {
        let downsample = self.value / magnification(scale);
        (downsample >= 1.0).then(|| (pixels as f64 * downsample).round() as i64)
    }
}

/// 5, 10 or 20.
pub fn magnification(scale: Scale) -> f64 {
    [5.0, 10.0, 20.0][scale as usize]
}

/// The scanner's power that a measured one means, or the measured one.
fn nearest(power: f64) -> f64 {
    POWERS.into_iter().find(|known| (power / known - 1.0).abs() <= TOLERANCE).unwrap_or(power)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_power_comes_from_objective_pixels_or_flag() {
        let power = |objective, microns, given| Power::choose(objective, microns, given).map(|p| (p.value, p.source));
        assert_eq!(power(Some(40.0), Some(0.2265), None), Some((40.0, PowerSource::Objective)));
        assert_eq!(power(Some(40.0), Some(0.499), None), Some((20.0, PowerSource::MicronsNotObjective)));
        assert_eq!(power(None, Some(0.2527), None), Some((40.0, PowerSource::Microns)));
        assert_eq!(power(None, Some(0.35), None), Some((10.0 / 0.35, PowerSource::Microns)));
        assert_eq!(power(Some(40.0), None, Some(20.0)), Some((20.0, PowerSource::Flag)));
        assert_eq!(power(None, Some(352.8), None), None);
    }

    #[test]
    fn patches_of_one_magnification_are_larger_on_slides_of_more_power() {
        let size = |value, scale| Power { value, source: PowerSource::Flag }.at_level_0(scale, 256);
        assert_eq!(Scale::ALL.map(|scale| size(40.0, scale)), [Some(2048), Some(1024), Some(512)]);
        assert_eq!(Scale::ALL.map(|scale| size(20.0, scale)), [Some(1024), Some(512), Some(256)]);
        assert_eq!(Scale::ALL.map(|scale| size(10.0, scale)), [Some(512), Some(256), None]);
    }
}

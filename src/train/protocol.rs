//! How a fold's epoch is chosen, and what its label bins are cut from.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{config::RunConfig, cox};
use crate::{
    Error, Result,
    data::{
        cohort::Slide,
        dataset::{Dataset, Fold},
        labels::Bins,
        sampler::shuffled,
    },
    loss::Loss,
};

/// How a fold's epoch is chosen, and what its label bins are cut from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// The epoch that is best on the fold's validation slides, on which it is then reported, or on
    /// its test slides where it has some; bins of all slides but those.
    Published,
    /// The epoch that is best on a fifth of the training patients, which no weight is trained on;
    /// bins of the training slides; the fold's validation slides are used once, at the end. Where a
    /// fold has test slides, the validation slides choose the epoch.
    Nested,
}

/// The share of the training patients that chooses the epoch.
const INNER_SHARE: f64 = 0.2;

/// Sets the inner split's draws apart from the epochs'.
const INNER_EPOCH: usize = usize::MAX;

/// What a report's sentence on the protocol depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reported<'a> {
    /// The loss of the training; Cox has no label bins to speak of.
    pub loss: Loss,
    /// Whether the folds have test slides, which the results then are of.
    pub tested: bool,
    /// How many folds the results are of.
    pub folds: usize,
    /// The folds none of whose epochs could be chosen.
    pub unchosen: &'a [usize],
}

impl Protocol {
    /// What a report says of it.
    pub fn sentence(self, reported: &Reported) -> String {
        let Reported { loss, tested, folds, unchosen } = *reported;
        let bins = |of: &str| {
            if loss == Loss::CoxSurv { String::new() } else { format!(", and label bins were cut over {of}") }
        };
        let no_choice = "no two of the slides meant to choose it can be compared";
        if unchosen.len() == folds {
            return format!("The last epoch of each fold is shown: {no_choice}. Epochs count from 1.");
        }
        let mut text = self.rule(tested, bins);
        if !unchosen.is_empty() {
            let numbers: Vec<String> = unchosen.iter().map(usize::to_string).collect();
            let several = if numbers.len() == 1 { "" } else { "s" };
            text += &format!(" Of fold{several} {} the last epoch is shown, since {no_choice}.", numbers.join(", "));
        }
        text + " Epochs count from 1."
    }

    fn rule(self, tested: bool, bins: impl Fn(&str) -> String) -> String {
        match (self, tested) {
            (Self::Published, false) => format!(
                "As published, each fold\u{2019}s epoch was chosen by the C-index on the validation slides that it is shown for{}: \
                 an optimistic estimate.",
                bins("all slides")
            ),
            (Self::Nested, false) => format!(
                "Nested: each fold\u{2019}s epoch was chosen by the C-index on a fifth of its training patients, which were held out of training{}; \
                 the validation slides were used once, for the result shown.",
                bins("the training slides")
            ),
            (_, true) => format!(
                "The results are of the folds\u{2019} test slides, which were used once: each fold\u{2019}s epoch was chosen by the C-index on its \
                 validation slides{}.",
                bins(if self == Self::Nested { "the training slides" } else { "all slides but the test slides" })
            ),
        }
    }
}

/// What the trainer of a fold sees.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// The fold's number.
    pub fold: usize,
    /// What labels are made by; none with the Cox loss.
    pub bins: Bins,
    /// The slides to train on, and those to choose the epoch by.
    pub slides: Fold,
    /// Slides of the fold that it does not see.
    pub held_out: usize,
}

/// The part of fold `i` that training may see.
pub fn prepare(config: &RunConfig, dataset: &Dataset, (i, fold): (usize, &Fold)) -> Result<Part> {
    let nested = config.protocol == Protocol::Nested;
    let of = |slides: &mut dyn Iterator<Item = usize>| slides.map(|slide| dataset.slides[slide].clone()).collect();
    let of_fold = |e: Error| Error::Usage(format!("fold {i}: {e}"));
    let bins = match (config.loss_fn, nested) {
        (Loss::CoxSurv, _) => Bins::default(),
        (_, false) => {
            let seen: Vec<Slide> = of(&mut (0..dataset.slides.len()).filter(|slide| !fold.test.contains(slide)));
            Bins::cut(&seen, config.n_classes).map_err(of_fold)?
        }
        (_, true) => {
            let training: Vec<Slide> = of(&mut fold.train.iter().copied());
            Bins::cut(&training, config.n_classes).map_err(of_fold)?
        }
    };
    let (slides, held_out) = match (nested, fold.test.len()) {
        (false, 0) => (fold.clone(), 0),
        (true, 0) => (inner_split(&dataset.slides, fold, config.seed, i)?, fold.val.len()),
        // held out as it is, by the fold itself
        (_, tested) => (Fold { test: Vec::new(), ..fold.clone() }, tested),
    };
    if config.loss_fn == Loss::CoxSurv {
        cox::check(config, dataset, (i, &slides))?;
    }
    Ok(Part { fold: i, bins, slides, held_out })
}

/// The training slides of fold `i` in two parts by patient, with and without an event apart.
fn inner_split(slides: &[Slide], fold: &Fold, seed: u64, i: usize) -> Result<Fold> {
    // by name, so that the order of rows does not matter
    let mut event: BTreeMap<&str, bool> = BTreeMap::new();
    for &slide in &fold.train {
        *event.entry(slides[slide].patient()).or_default() |= !slides[slide].censored;
    }
    let mut chosen = std::collections::BTreeSet::new();
    for with_event in [true, false] {
        let cases: Vec<&str> = event.iter().filter(|(_, event)| **event == with_event).map(|(case, _)| *case).collect();
        if with_event && cases.len() < 2 {
            return Err(Error::Usage(format!(
                "--protocol nested: {} training patients of fold {i} have an event, expected at least 2 to split them",
                cases.len()
            )));
        }
        let share = (INNER_SHARE * cases.len() as f64).round().max(1.0) as usize;
        let order = shuffled(cases.len(), seed, i, INNER_EPOCH - usize::from(with_event));
        // a lone patient is for training
        chosen.extend(order.into_iter().take(share.min(cases.len().saturating_sub(1))).map(|case| cases[case]));
    }
    let (val, train) = fold.train.iter().partition(|&&slide| chosen.contains(slides[slide].patient()));
    Ok(Fold { train, val, ..fold.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 40 patients, of whom every fourth has an event and every fifth a second slide.
    fn cohort() -> (Vec<Slide>, Fold) {
        let slides: Vec<Slide> = (0..48)
            .map(|row| {
                let patient = if row < 40 { row } else { (row - 40) * 5 };
                Slide {
                    case_id: format!("case-{patient:02}"),
                    slide_id: format!("slide-{row}"),
                    months: (patient * 7 % 11) as f64,
                    censored: patient % 4 != 0,
                }
            })
            .collect();
        let fold =
            Fold { train: (0..48).filter(|row| row % 40 >= 4).collect(), val: vec![0, 1, 2, 3], ..Fold::default() };
        (slides, fold)
    }

    #[test]
    fn the_inner_split_is_by_patient_and_keeps_the_share_of_events() {
        let (slides, fold) = cohort();
        let inner = inner_split(&slides, &fold, 7, 0).unwrap();
        let cases = |side: &[usize]| -> std::collections::BTreeSet<String> {
            side.iter().map(|&slide| slides[slide].case_id.clone()).collect()
        };
        let (train, val) = (cases(&inner.train), cases(&inner.val));
        assert!(train.is_disjoint(&val), "a patient is on both sides");
        let mut both = [inner.train.clone(), inner.val.clone()].concat();
        both.sort_unstable();
        assert_eq!(both, fold.train, "the outer validation is touched, or a slide is lost");
        // a fifth of the patients of each kind, rounded
        let patients = |event: bool| {
            let of = |cases: &std::collections::BTreeSet<String>| {
                cases.iter().filter(|case| slides.iter().any(|s| s.case_id == **case && s.censored != event)).count()
            };
            (of(&val), of(&train))
        };
        for event in [true, false] {
            let (val, train) = patients(event);
            assert_eq!(val, ((val + train) as f64 * 0.2).round() as usize, "event {event}");
        }
        assert_eq!(inner, inner_split(&slides, &fold, 7, 0).unwrap());
        assert_ne!(inner, inner_split(&slides, &fold, 8, 0).unwrap());
        assert_ne!(inner, inner_split(&slides, &fold, 7, 1).unwrap());
    }

    #[test]
    fn a_patient_with_several_barcodes_is_not_split() {
        let (mut slides, fold) = cohort();
        for (row, slide) in slides.iter_mut().enumerate() {
            slide.case_id = format!("TCGA-AA-00{}-01Z-00-DX{row}", &slide.case_id[5..]);
        }
        let inner = inner_split(&slides, &fold, 7, 0).unwrap();
        let patients = |side: &[usize]| -> std::collections::BTreeSet<&str> {
            side.iter().map(|&slide| slides[slide].patient()).collect()
        };
        let (train, val) = (patients(&inner.train), patients(&inner.val));
        assert_eq!((train.len() + val.len(), train.is_disjoint(&val)), (36, true));
    }

    #[test]
    fn one_event_cannot_be_split() {
        let (mut slides, fold) = cohort();
        slides.iter_mut().filter(|slide| slide.case_id != "case-08").for_each(|slide| slide.censored = true);
        let error = inner_split(&slides, &fold, 7, 3).unwrap_err().to_string();
        assert!(error.contains("1 training patients of fold 3 have an event"), "{error}");
    }
}

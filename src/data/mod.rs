//! Feature bags, cohort tables, labels, folds and sampling.

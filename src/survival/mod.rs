//! Survival statistics on plain slices; usable without the rest of the crate.

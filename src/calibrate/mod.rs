//! What a model's layers see when it reads text.
//!
//! Enters: samples, weights of one block at a time. Leaves: residual streams, inputs of matrices, their second moments,
//! and those of gradients at outputs. Decides nothing about rounding. The samples are cut into a fixed number of cells,
//! whatever the machine; every sum runs over a cell in order and cells are combined in one fixed tree, so that the bits do
//! not depend on who computes what.

pub mod capture;
pub mod cells;
pub mod documents;
pub mod experts;
pub mod gradients;
pub mod importance;
pub mod layer;
pub mod samples;
pub mod second_moments;
pub mod statistics;
pub mod statistics_file;
pub mod stream;

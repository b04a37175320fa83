//! What a Nemotron-H checkpoint is: its sizes, its block pattern, its tensors by name and role.

pub mod config;
pub mod description;
pub mod hybrid_pattern;
pub mod nemotron_h;
mod text_file;
pub mod tokenizer;

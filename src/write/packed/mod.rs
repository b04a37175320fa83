//! Packed safetensors: the parts of a linear, and the folder around them.
//!
//! Enters: integer rows, files of the checkpoint. Leaves: a folder that vLLM and transformers load.

pub mod config_text;
pub mod folder;
pub mod parts;

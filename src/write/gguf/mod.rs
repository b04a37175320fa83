//! GGUF files: their keys and tensor order.

pub mod general_keys;
pub mod tokenizer_keys;

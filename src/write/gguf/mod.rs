//! GGUF files: their keys and tensor order.

pub mod tokenizer_keys;

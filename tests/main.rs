//! Integration tests: one binary.

mod parity;

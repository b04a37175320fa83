//! Rewrites leave the function as it is, each by itself and all together; what is no rewrite does not.

mod exact;
mod models;
mod network;
mod sidecar;

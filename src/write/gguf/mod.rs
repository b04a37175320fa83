//! GGUF files: their keys, their parts and how they come to stand under their final names.

pub mod architecture_keys;
pub mod artifact;
pub mod general_keys;
pub mod parts;
pub mod tokenizer_keys;

use nemoconv_formats::Imatrix;
use nemoconv_formats::gguf::Metadata;

use crate::model::description::ModelDescription;
use crate::model::tokenizer::Tokenizer;
use crate::plan::Plan;

/// An importance matrix with the name of its file.
#[derive(Debug, Clone, Copy)]
pub struct NamedImatrix<'a> {
    /// As the user spelled it.
    pub path: &'a str,
    /// Its contents.
    pub imatrix: &'a Imatrix,
}

/// Longest text llama-quantize stores for an importance matrix.
const MAX_IMATRIX_TEXT_BYTES: usize = 127;

/// All metadata of the artifact, in the stock converter's order.
pub fn metadata(
    plan: &Plan,
    description: &ModelDescription,
    tokenizer: &Tokenizer,
    imatrix: Option<NamedImatrix>,
) -> Metadata {
    let mut metadata = Metadata::new();
    metadata.set(
        "general.architecture",
        architecture_keys::architecture(&plan.config),
    );
    general_keys::general_keys(description, &mut metadata);
    architecture_keys::architecture_keys(plan, &mut metadata);
    tokenizer_keys::tokenizer_keys(tokenizer, &mut metadata);
    if let Some(imatrix) = imatrix {
        let entries = plan.coverage.map_or(0, |coverage| coverage.steered);
        imatrix_keys(imatrix, entries, &mut metadata);
    }
    metadata
}

fn imatrix_keys(source: NamedImatrix, entries: usize, metadata: &mut Metadata) {
    metadata.set("quantize.imatrix.file", clip(source.path));
    if let Some(dataset) = source.imatrix.datasets.first() {
        metadata.set("quantize.imatrix.dataset", clip(dataset));
    }
    metadata.set("quantize.imatrix.entries_count", entries as u32);
    metadata.set("quantize.imatrix.chunks_count", source.imatrix.chunk_count);
}

/// Cuts at a character border.
fn clip(text: &str) -> &str {
    let mut end = text.len().min(MAX_IMATRIX_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

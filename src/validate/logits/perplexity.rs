//! llama.cpp's chunked perplexity: which positions of a text are scored, and the mean over them.
//!
//! Enters: token ids of a whole text, negative log-likelihoods. Leaves: chunks to run, an [`Estimate`]. Not the rolling
//! perplexity of lm-eval, which scores every token once.

use super::statistics;
use crate::error::{Error, Fault, Result};
use crate::report::Estimate;

/// Contexts beyond this are a mistake or an attack.
pub const MAX_CONTEXT_TOKENS: usize = 1 << 24;

/// A text cut into chunks of `context_tokens`; the rest is dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkedText {
    tokens: Vec<u32>,
    context_tokens: usize,
    bos: Option<u32>,
}

impl ChunkedText {
    /// Cuts the tokens of a whole text, which begin with BOS if the model adds it. `bos` is that token if the model adds
    /// it: it replaces the first token of every chunk where it is run, not where it is scored.
    ///
    /// # Errors
    /// Fewer tokens than one chunk, or a context too short to score a position.
    pub fn new(
        mut tokens: Vec<u32>,
        context_tokens: usize,
        bos: Option<u32>,
        max_chunks: Option<usize>,
    ) -> Result<Self> {
        if !(3..=MAX_CONTEXT_TOKENS).contains(&context_tokens) {
            let what = format!("a context of {context_tokens} tokens scores nothing");
            let fault = Fault::new(what).hint("use a context of 512 tokens or more");
            return Err(Error::Plan(fault));
        }
        let chunks = tokens.len() / context_tokens;
        if chunks == 0 {
            let found = tokens.len();
            let what = format!("the text has {found} tokens, one chunk needs {context_tokens}");
            let fault = Fault::new(what).hint("use a longer text or a shorter context");
            return Err(Error::Plan(fault));
        }
        let chunks = chunks.min(max_chunks.unwrap_or(usize::MAX).max(1));
        tokens.truncate(chunks * context_tokens);
        Ok(Self {
            tokens,
            context_tokens,
            bos,
        })
    }

    /// Tokens of a chunk.
    pub fn context_tokens(&self) -> usize {
        self.context_tokens
    }

    /// The token that begins every chunk where it is run.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// All tokens, as they are scored.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The chunks, in order; each starts from an empty state.
    pub fn chunks(&self) -> impl ExactSizeIterator<Item = Chunk<'_>> {
        let bos = self.bos;
        let chunks = self.tokens.chunks_exact(self.context_tokens);
        chunks.map(move |tokens| Chunk { tokens, bos })
    }

    /// Scored positions of all chunks.
    pub fn positions(&self) -> usize {
        scored_positions(self.context_tokens).len() * self.chunks().len()
    }
}

/// The positions of a chunk whose logits are scored: those of the second half that have a next token.
pub fn scored_positions(context_tokens: usize) -> std::ops::Range<usize> {
    context_tokens / 2..context_tokens.saturating_sub(1).max(context_tokens / 2)
}

/// One chunk of a text.
#[derive(Debug, Clone, Copy)]
pub struct Chunk<'a> {
    tokens: &'a [u32],
    bos: Option<u32>,
}

impl<'a> Chunk<'a> {
    /// The tokens to run.
    pub fn input(&self) -> Vec<u32> {
        let mut input = self.tokens.to_vec();
        if let (Some(first), Some(bos)) = (input.first_mut(), self.bos) {
            *first = bos;
        }
        input
    }

    /// Each scored position and the token it should predict.
    pub fn scored(&self) -> impl ExactSizeIterator<Item = (usize, u32)> + use<'a> {
        let tokens = self.tokens;
        scored_positions(tokens.len()).map(move |position| (position, tokens[position + 1]))
    }
}

/// exp of the mean negative log-likelihood, with its standard error.
pub fn perplexity(nlls: &[f64]) -> Estimate {
    statistics::exp(statistics::mean(nlls))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_as_llama_cpp_cuts_it() {
        let text = ChunkedText::new((0..20).collect(), 8, Some(99), None).unwrap();
        let chunks: Vec<_> = text.chunks().collect();
        assert_eq!(chunks.len(), 2);
        assert_eq!(chunks[1].input(), [99, 9, 10, 11, 12, 13, 14, 15]);
        let scored: Vec<_> = chunks[1].scored().collect();
        assert_eq!(scored, [(4, 13), (5, 14), (6, 15)]);
        assert_eq!(text.positions(), 6);
        assert_eq!(text.tokens().len(), 16);
    }

    #[test]
    fn without_bos_and_with_a_limit() {
        let text = ChunkedText::new((0..512 * 3).collect(), 512, None, Some(2)).unwrap();
        assert_eq!(text.chunks().len(), 2);
        assert_eq!(text.chunks().next().unwrap().input()[0], 0);
        assert_eq!(text.chunks().next().unwrap().scored().len(), 255);
    }

    #[test]
    fn texts_too_short_are_refused() {
        let check = |tokens: u32, context, expected: &str| {
            let error = ChunkedText::new((0..tokens).collect(), context, None, None).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        };
        check(511, 512, "511 tokens, one chunk needs 512");
        check(10, 2, "scores nothing");
        check(10, 0, "scores nothing");
        check(10, usize::MAX, "scores nothing");
    }

    /// numpy: exp(mean), exp(mean) * sqrt(var / (n - 1)).
    #[test]
    fn perplexity_as_numpy_has_it() {
        let nlls: Vec<f64> = (1..=12).map(|i| f64::from(i) / 4.0).collect();
        let found = perplexity(&nlls);
        assert!((found.value - 5.0784190371800815).abs() < 1e-12);
        assert!((found.error - 1.3214465300924136).abs() < 1e-12);
    }
}

//! Which of the samples are measured on, and how they are run together.

/// Tokens whose second moments are taken.
const MOMENT_TOKENS: usize = 16 << 10;
/// Tokens that the probes are run on: others than those.
const PROBE_TOKENS: usize = 8 << 10;
/// Tokens that are run together.
const BATCH_TOKENS: usize = 2048;

/// Sequences that are run together.
pub struct Batch {
    pub tokens: Vec<u32>,
    pub lengths: Vec<usize>,
    /// Residual streams of the original network before the block that is looked at.
    pub residual: Vec<f32>,
}

/// Evenly spaced sequences for second moments and for probes; the same ones only where there are too few.
pub fn choose_sequences(sequences: &[Vec<u32>]) -> (Vec<&[u32]>, Vec<&[u32]>) {
    let length = sequences
        .first()
        .map_or(1, |sequence| sequence.len().max(1));
    let wanted = (MOMENT_TOKENS + PROBE_TOKENS)
        .div_ceil(length)
        .min(sequences.len());
    let chosen = (0..wanted).map(|index| sequences[index * sequences.len() / wanted].as_slice());
    let probes = 1 + MOMENT_TOKENS / PROBE_TOKENS;
    let (mut for_moments, mut for_probes) = (Vec::new(), Vec::new());
    for (index, sequence) in chosen.enumerate() {
        match index % probes == probes - 1 {
            true => for_probes.push(sequence),
            false => for_moments.push(sequence),
        }
    }
    if for_probes.is_empty() {
        for_probes.clone_from(&for_moments);
    }
    (for_moments, for_probes)
}

/// Sequences as batches, in order.
pub fn batches(sequences: &[&[u32]]) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    for sequence in sequences {
        let fits = |batch: &&mut Batch| batch.tokens.len() + sequence.len() <= BATCH_TOKENS;
        match batches.last_mut().filter(fits) {
            Some(batch) => {
                batch.tokens.extend_from_slice(sequence);
                batch.lengths.push(sequence.len());
            }
            None => batches.push(Batch {
                tokens: sequence.to_vec(),
                lengths: vec![sequence.len()],
                residual: Vec::new(),
            }),
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_read_what_moments_have_not() {
        let sequences: Vec<Vec<u32>> = (0..200).map(|n| vec![n; 512]).collect();
        let (moments, probes) = choose_sequences(&sequences);
        assert_eq!((moments.len(), probes.len()), (32, 16));
        assert!(probes.iter().all(|sequence| !moments.contains(sequence)));
        let (moments, probes) = choose_sequences(&sequences[..1]);
        assert_eq!((moments.len(), probes.len()), (1, 1));
        let batches = batches(&moments);
        assert_eq!((batches.len(), &batches[0].lengths[..]), (1, &[512][..]));
    }
}

//! llama.cpp's importance matrices: how strongly the inputs of each weight's columns are driven.
//!
//! Enters: a file of llama-imatrix, GGUF or the older `.dat`, unchecked. Leaves: the mean square of every input, per
//! weight (llama.cpp, common/imatrix-loader.cpp and tools/quantize/quantize.cpp, `load_imatrix`). Knows no weighting.
//! [`ImatrixFile`] is the way back.

#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        clippy::unwrap_used,
        reason = "the bytes read here are untrusted"
    )
)]

mod write;

pub use write::{ImatrixFile, ImatrixSums};

use crate::{
    Error, GgmlType, MappedFile, Result,
    cursor::Cursor,
    gguf::{self, Array, Header, Metadata, TensorInfo, Value},
};
use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

const DATASETS_KEY: &str = "imatrix.datasets";
const CHUNK_COUNT_KEY: &str = "imatrix.chunk_count";
const CHUNK_SIZE_KEY: &str = "imatrix.chunk_size";

const SQUARES_SUFFIX: &str = ".in_sum2";
const COUNTS_SUFFIX: &str = ".counts";

/// Mean squares of the inputs of every weight that was observed.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct Imatrix {
    /// The text files it was made from.
    pub datasets: Vec<String>,
    /// How many chunks of text were run.
    pub chunk_count: u32,
    importance: BTreeMap<String, Vec<f32>>,
}

impl Imatrix {
    /// Reads a file of either form, told apart by GGUF's magic.
    ///
    /// # Errors
    /// As [`Self::parse`], with the path; the file cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        Self::parse(file.bytes()).map_err(|error| {
            let error = Error::malformed(format!("no importance matrix can be read: {error}"));
            let hint = "name a file of `llama-imatrix` or `nemoconv calibrate --imatrix`";
            error.in_file(path).hint(hint)
        })
    }

    /// Reads the bytes of a file of either form.
    ///
    /// # Errors
    /// The bytes contradict their form, a sum or count is not finite or is negative, or a GGUF file is no importance
    /// matrix.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        match bytes.starts_with(gguf::MAGIC) {
            true => parse_gguf(bytes),
            false => parse_dat(bytes),
        }
    }

    /// Names of weights, sorted, with their importance.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = (&str, &[f32])> {
        self.importance
            .iter()
            .map(|(name, values)| (name.as_str(), values.as_slice()))
    }

    /// The importance of the columns of weight `name`, such as `blk.0.ssm_in.weight`: the mean of the squared input.
    ///
    /// Layout: `[matrices, columns]`, where matrices is the number of experts for stacked experts, else 1. All ones for
    /// an expert that no token reached.
    pub fn importance(&self, name: &str) -> Option<&[f32]> {
        self.importance.get(name).map(Vec::as_slice)
    }
}

fn parse_gguf(bytes: &[u8]) -> Result<Imatrix> {
    let header = Header::parse(bytes)?;
    let datasets = match required(&header.metadata, DATASETS_KEY)? {
        Value::Array(Array::String(datasets)) => datasets.clone(),
        _ => return Err(Error::malformed("must be an array of strings").in_tensor(DATASETS_KEY)),
    };
    let chunk_count = required_u32(&header.metadata, CHUNK_COUNT_KEY)?;
    required_u32(&header.metadata, CHUNK_SIZE_KEY)?;
    let by_name: HashMap<&str, &TensorInfo> = header
        .tensors
        .iter()
        .map(|t| (t.name.as_str(), t))
        .collect();
    let mut importance = BTreeMap::new();
    for tensor in &header.tensors {
        if let Some(weight) = tensor.name.strip_suffix(SQUARES_SUFFIX) {
            let counts = partner(&by_name, weight, COUNTS_SUFFIX)?;
            let data = |tensor| f32s(bytes, &header, tensor);
            let values = means(tensor, &data(tensor)?, counts, &data(counts)?)?;
            importance.insert(weight.to_owned(), values);
        }
        if let Some(weight) = tensor.name.strip_suffix(COUNTS_SUFFIX) {
            partner(&by_name, weight, SQUARES_SUFFIX)?;
        }
    }
    Ok(Imatrix {
        datasets,
        chunk_count,
        importance,
    })
}

fn required<'a>(metadata: &'a Metadata, key: &str) -> Result<&'a Value> {
    metadata
        .get(key)
        .ok_or_else(|| Error::missing(format!("not an importance matrix: key `{key}` is missing")))
}

fn required_u32(metadata: &Metadata, key: &str) -> Result<u32> {
    match required(metadata, key)? {
        Value::U32(value) => Ok(*value),
        _ => Err(Error::malformed("must be a u32").in_tensor(key)),
    }
}

/// The other tensor of `weight`, found by its suffix.
fn partner<'a>(
    by_name: &HashMap<&str, &'a TensorInfo>,
    weight: &str,
    suffix: &str,
) -> Result<&'a TensorInfo> {
    let name = format!("{weight}{suffix}");
    by_name
        .get(name.as_str())
        .copied()
        .ok_or_else(|| Error::missing(format!("tensor `{name}` is missing")))
}

/// The values of a tensor of the file.
fn f32s(bytes: &[u8], header: &Header, tensor: &TensorInfo) -> Result<Vec<f32>> {
    if tensor.ty != GgmlType::F32 {
        return Err(
            Error::malformed(format!("must be F32, found {}", tensor.ty)).in_tensor(&tensor.name),
        );
    }
    let start = header.data_offset.saturating_add(tensor.offset);
    let mut cursor = Cursor::new(bytes);
    cursor.take(start)?;
    let values = cursor.numbers(tensor.elements(), f32::from_le_bytes)?;
    check_values(&values).map_err(|e| e.in_tensor(&tensor.name).at(start))?;
    Ok(values)
}

/// Sums and counts are never negative, infinite or NaN.
fn check_values(values: &[f32]) -> Result<()> {
    match values
        .iter()
        .find(|value| !(value.is_finite() && **value >= 0.0))
    {
        None => Ok(()),
        Some(value) => Err(Error::malformed(format!(
            "values must be finite and not negative, found {value}"
        ))),
    }
}

/// Sums of squares over counts, matrix by matrix; ones where the count is zero.
fn means(
    squares: &TensorInfo,
    sums: &[f32],
    counts_of: &TensorInfo,
    counts: &[f32],
) -> Result<Vec<f32>> {
    let columns = squares.dims.first().copied().unwrap_or(1);
    let columns = usize::try_from(columns).unwrap_or(usize::MAX);
    if columns == 0 || counts.is_empty() || squares.rows() != counts_of.elements() {
        let (sums, counts) = (&squares.dims, &counts_of.dims);
        let what = format!("sums {sums:?} and counts {counts:?} do not belong together");
        return Err(Error::malformed(what).in_tensor(&squares.name));
    }
    let mut means = Vec::with_capacity(sums.len());
    for (sums, count) in sums.chunks(columns).zip(counts) {
        // The file holds whole numbers as floats; llama.cpp rounds them.
        let count = count.round();
        means.extend(
            sums.iter()
                .map(|sum| if count > 0.0 { sum / count } else { 1.0 }),
        );
    }
    Ok(means)
}

/// i32 entries; each i32 length, name, i32 calls, i32 values, f32 mean square * calls; then, in later versions, i32
/// chunks, i32 length, dataset.
fn parse_dat(bytes: &[u8]) -> Result<Imatrix> {
    let mut cursor = Cursor::new(bytes);
    let entries = positive(&mut cursor, "number of entries")?;
    let mut imatrix = Imatrix::default();
    for _ in 0..entries {
        let (name, values) = dat_entry(&mut cursor)?;
        if imatrix.importance.insert(name.to_owned(), values).is_some() {
            return Err(Error::malformed("entry is there twice")
                .in_tensor(name)
                .at(cursor.at()));
        }
    }
    if !cursor.is_at_end() {
        imatrix.chunk_count = count(&mut cursor, "number of chunks")?;
    }
    if !cursor.is_at_end() {
        let length = count(&mut cursor, "length of the dataset name")?;
        let dataset = cursor.text(length.into())?;
        imatrix
            .datasets
            .extend((!dataset.is_empty()).then(|| dataset.to_owned()));
    }
    match cursor.is_at_end() {
        true => Ok(imatrix),
        false => Err(Error::malformed("bytes follow the dataset name").at(cursor.at())),
    }
}

fn dat_entry<'a>(cursor: &mut Cursor<'a>) -> Result<(&'a str, Vec<f32>)> {
    let length = positive(cursor, "length of the name")?;
    let name = cursor.text(length.into())?;
    let name_it = |e: Error| e.in_tensor(name);
    let calls = cursor.number(i32::from_le_bytes).map_err(name_it)?;
    let value_count = positive(cursor, "number of values").map_err(name_it)?;
    let at = cursor.at();
    let mut values = cursor
        .numbers(value_count.into(), f32::from_le_bytes)
        .map_err(name_it)?;
    check_values(&values).map_err(|e| name_it(e).at(at))?;
    if calls > 0 {
        values.iter_mut().for_each(|value| *value /= calls as f32);
    }
    Ok((name, values))
}

/// An i32 that counts something.
fn count(cursor: &mut Cursor, what: &str) -> Result<u32> {
    let at = cursor.at();
    let found = cursor.number(i32::from_le_bytes)?;
    u32::try_from(found).map_err(|_| Error::malformed(format!("{what} is {found}")).at(at))
}

/// An i32 that counts something which must be there.
fn positive(cursor: &mut Cursor, what: &str) -> Result<u32> {
    let at = cursor.at();
    match count(cursor, what)? {
        0 => Err(Error::malformed(format!("{what} is 0")).at(at)),
        count => Ok(count),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{Layout, NewTensor};

    fn f32_bytes(values: &[f32]) -> Vec<u8> {
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect()
    }

    fn keys() -> Metadata {
        let mut keys = Metadata::new();
        keys.set("general.type", "imatrix");
        keys.set(DATASETS_KEY, vec!["calib.txt".to_owned()]);
        keys.set(CHUNK_COUNT_KEY, 8u32);
        keys.set(CHUNK_SIZE_KEY, 512u32);
        keys
    }

    /// A GGUF file of these F32 tensors.
    fn file(keys: Metadata, tensors: &[(&str, &[u64], &[f32])]) -> Vec<u8> {
        let infos = tensors.iter().map(|(name, dims, _)| NewTensor {
            name: (*name).to_owned(),
            dims: dims.to_vec(),
            ty: GgmlType::F32,
        });
        let layout = Layout::new(keys, infos.collect()).unwrap();
        let mut bytes = layout.header_bytes().to_vec();
        for (index, (_, _, values)) in tensors.iter().enumerate() {
            bytes.resize(layout.tensor_offset(index) as usize, 0);
            bytes.extend(f32_bytes(values));
        }
        bytes
    }

    fn dat_entry(name: &[u8], calls: i32, values: &[f32]) -> Vec<u8> {
        let mut bytes = (name.len() as i32).to_le_bytes().to_vec();
        bytes.extend(name);
        bytes.extend(calls.to_le_bytes());
        bytes.extend((values.len() as i32).to_le_bytes());
        bytes.extend(f32_bytes(values));
        bytes
    }

    fn dat(entries: &[Vec<u8>], tail: &[u8]) -> Vec<u8> {
        [
            &(entries.len() as i32).to_le_bytes()[..],
            &entries.concat(),
            tail,
        ]
        .concat()
    }

    #[track_caller]
    fn check_refused(bytes: &[u8], expected: &str) {
        assert_eq!(Imatrix::parse(bytes).unwrap_err().to_string(), expected);
    }

    #[test]
    fn a_gguf_file_gives_means() {
        let imatrix = Imatrix::parse(&file(
            keys(),
            &[
                ("b.weight.counts", &[1, 3], &[2.0, 0.0, 4.4]),
                ("b.weight.in_sum2", &[2, 3], &[2.0, 4.0, 9.0, 9.0, 4.0, 1.0]),
                ("a.weight.in_sum", &[2, 1], &[-1.0, f32::NAN]),
                ("a.weight.in_sum2", &[2, 1], &[1.0, 3.0]),
                ("a.weight.counts", &[1, 1], &[3.0]),
                ("a.weight.stats", &[1], &[f32::NAN]),
            ],
        ))
        .unwrap();
        assert_eq!(imatrix.datasets, ["calib.txt"]);
        assert_eq!(imatrix.chunk_count, 8);
        let expected: [(&str, &[f32]); 2] = [
            ("a.weight", &[1.0 / 3.0, 1.0]),
            ("b.weight", &[1.0, 2.0, 1.0, 1.0, 1.0, 0.25]),
        ];
        assert_eq!(imatrix.entries().collect::<Vec<_>>(), expected);
        assert_eq!(imatrix.importance("a.weight"), Some(expected[0].1));
        assert_eq!(imatrix.importance("a"), None);
    }

    #[test]
    fn a_dat_file_gives_means() {
        let entries = [
            dat_entry(b"b.weight", 4, &[1.0, 2.0]),
            dat_entry(b"a.weight", 0, &[5.0]),
        ];
        let chunks = 8i32.to_le_bytes();
        let dataset = [&5i32.to_le_bytes()[..], b"c.txt"].concat();
        let empty = 0i32.to_le_bytes();
        for (tail, chunk_count, datasets) in [
            (vec![], 0, vec![]),
            (chunks.to_vec(), 8, vec![]),
            ([&chunks[..], &empty].concat(), 8, vec![]),
            (
                [&chunks[..], &dataset].concat(),
                8,
                vec!["c.txt".to_owned()],
            ),
        ] {
            let imatrix = Imatrix::parse(&dat(&entries, &tail)).unwrap();
            assert_eq!(
                (imatrix.chunk_count, &imatrix.datasets[..]),
                (chunk_count, &datasets[..])
            );
            let expected: [(&str, &[f32]); 2] = [("a.weight", &[5.0]), ("b.weight", &[0.25, 0.5])];
            assert_eq!(imatrix.entries().collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn lies_of_a_gguf_file() {
        let squares: (&str, &[u64], &[f32]) = ("a.in_sum2", &[2, 1], &[1.0, 3.0]);
        let counts: (&str, &[u64], &[f32]) = ("a.counts", &[1, 1], &[3.0]);
        fn check(tensors: &[(&str, &[u64], &[f32])], expected: &str) {
            check_refused(&file(keys(), tensors), expected);
        }
        check_refused(
            &file(Metadata::new(), &[squares, counts]),
            "not an importance matrix: key `imatrix.datasets` is missing",
        );
        let mut wrong = keys();
        wrong.set(CHUNK_COUNT_KEY, 8i32);
        check_refused(&file(wrong, &[]), "`imatrix.chunk_count`: must be a u32");
        check(&[squares], "tensor `a.counts` is missing");
        check(&[counts], "tensor `a.in_sum2` is missing");
        for (dims, values) in [(&[2, 1], &[3.0, 3.0][..]), (&[1, 0], &[])] {
            let message =
                format!("`a.in_sum2`: sums [2, 1] and counts {dims:?} do not belong together");
            check(&[squares, ("a.counts", dims, values)], &message);
        }
        for bad in [f32::NAN, f32::INFINITY, -1.0] {
            let place = Header::parse(&file(keys(), &[squares, counts]))
                .unwrap()
                .data_offset;
            let sums = format!(
                "`a.in_sum2`: values must be finite and not negative, found {bad} (at {place:#x})"
            );
            check(&[("a.in_sum2", &[2, 1], &[1.0, bad]), counts], &sums);
            let place = place + 32;
            let count = format!(
                "`a.counts`: values must be finite and not negative, found {bad} (at {place:#x})"
            );
            check(&[squares, ("a.counts", &[1, 1], &[bad])], &count);
        }
        let half = NewTensor {
            name: "a.in_sum2".to_owned(),
            dims: vec![0],
            ty: GgmlType::F16,
        };
        let count = NewTensor {
            name: "a.counts".to_owned(),
            dims: vec![0],
            ty: GgmlType::F32,
        };
        let layout = Layout::new(keys(), vec![half, count]).unwrap();
        check_refused(layout.header_bytes(), "`a.in_sum2`: must be F32, found F16");
    }

    #[test]
    fn lies_of_a_dat_file() {
        let good = dat_entry(b"a", 1, &[1.0]);
        check_refused(&[], "file is truncated: expected 4 bytes, found 0 (at 0x0)");
        check_refused(&dat(&[], &[]), "number of entries is 0 (at 0x0)");
        check_refused(&(-1i32).to_le_bytes(), "number of entries is -1 (at 0x0)");
        check_refused(
            &i32::MAX.to_le_bytes(),
            "file is truncated: expected 8 bytes, found 4 (at 0x4)",
        );
        check_refused(
            &dat(&[dat_entry(b"", 1, &[1.0])], &[]),
            "length of the name is 0 (at 0x4)",
        );
        check_refused(
            &dat(&[dat_entry(b"a\xff", 1, &[1.0])], &[]),
            "text is not UTF-8 (at 0x9)",
        );
        check_refused(
            &dat(&[dat_entry(b"a", 1, &[])], &[]),
            "`a`: number of values is 0 (at 0xd)",
        );
        check_refused(
            &dat(&[dat_entry(b"a", 1, &[f32::NAN])], &[]),
            "`a`: values must be finite and not negative, found NaN (at 0x11)",
        );
        check_refused(
            &dat(&[good.clone(), good.clone()], &[]),
            "`a`: entry is there twice (at 0x26)",
        );
        check_refused(
            &dat(std::slice::from_ref(&good), &[0; 9]),
            "bytes follow the dataset name (at 0x1d)",
        );
        let whole = dat(&[good], &[]);
        for end in 0..whole.len() {
            assert!(Imatrix::parse(&whole[..end]).is_err(), "cut at {end}");
        }
    }
}

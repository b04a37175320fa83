//! What is written is read back, and what are no statistics is refused by name.

use std::path::PathBuf;

use super::*;

fn origin() -> Origin {
    Origin {
        nemoconv: "0.0.0".to_owned(),
        model_sha256: vec!["aa".to_owned(), "bb".to_owned()],
        samples_sha256: "cc".to_owned(),
        tokens: 6,
        sequences: 2,
        context_tokens: 4,
        seed: u64::MAX,
    }
}

const TRIANGLE: [f64; 6] = [1.0, 2.0, 3.0, 4.0, -5.0, 6.0];

fn with(place: usize, value: f64) -> Kept {
    let mut triangle = TRIANGLE.to_vec();
    triangle[place] = value;
    triangle.into()
}

fn some() -> Statistics {
    let stream = |factor: f64| StreamMoments {
        n: 3,
        triangle: TRIANGLE.map(|x| x * factor).to_vec().into(),
        tokens: 6,
    };
    let sums = |tokens: u64| {
        (tokens > 0).then(|| InputSums {
            squares: vec![0.1, 1e-300],
            max_abs: vec![0.5, 0.0],
            tokens,
            weight: 0.25 * tokens as f64,
        })
    };
    let inputs = [
        ("blk.0.ffn_down.weight".to_owned(), vec![sums(6)]),
        (
            "blk.0.ffn_up_exps.weight".to_owned(),
            vec![sums(0), sums(5)],
        ),
    ];
    Statistics {
        residual: vec![stream(1.0), stream(0.1)],
        inputs: inputs.into_iter().collect(),
    }
}

fn bytes(statistics: &Statistics) -> Vec<u8> {
    let mut bytes = Vec::new();
    statistics.write(&origin(), &mut bytes).unwrap();
    bytes
}

struct Saved {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

fn save(bytes: &[u8]) -> Saved {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s.safetensors");
    std::fs::write(&path, bytes).unwrap();
    Saved {
        _folder: folder,
        path,
    }
}

#[test]
fn what_is_written_is_read_back() {
    let written = bytes(&some());
    let saved = save(&written);
    let (statistics, found) = Statistics::open(&saved.path).unwrap();
    assert_eq!(statistics, some());
    assert_eq!(found, origin());
    assert_eq!(bytes(&statistics), written);
    let foreign = safetensors::SafeTensors::deserialize(&written).unwrap();
    assert_eq!(foreign.len(), 1 + 2 + 2 * 4);
}

/// Replaces `from` in the header, which keeps its length, and expects a message.
#[track_caller]
fn check(from: &str, to: &str, expected: &str) {
    let mut written = bytes(&some());
    let len = u64::from_le_bytes(written[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(written[8..8 + len].to_vec()).unwrap();
    assert!(header.contains(from), "{header}");
    let mut header = header.trim_end().replacen(from, to, 1);
    assert!(header.len() <= len);
    header.extend(std::iter::repeat_n(' ', len - header.len()));
    written[8..8 + len].copy_from_slice(header.as_bytes());
    refused(&written, expected);
}

#[track_caller]
fn refused(bytes: &[u8], expected: &str) {
    let saved = save(bytes);
    let message = Statistics::open(&saved.path).unwrap_err().to_string();
    assert!(message.contains(expected), "{message}");
    assert!(message.contains("s.safetensors"), "{message}");
}

#[test]
fn lies_of_a_header() {
    check("\"format\"", "\"f\"", "key `format` is missing");
    check(
        "nemoconv.statistics",
        "other",
        "`format`: must be `nemoconv.statistics`",
    );
    check(
        "\"format.version\":\"1\"",
        "\"format.version\":\"2\"",
        "must be `1`, found `2`",
    );
    check(
        "\"samples.tokens\":\"6\"",
        "\"samples.tokens\":\"x\"",
        "must be a number",
    );
    check("residual.1\"", "residual.7\"", "`residual.1`: is missing");
    check(
        "ffn_down.weight.squares",
        "ffn_down.weight.squared",
        "belongs to no statistics",
    );
    check(
        "ffn_down.weight.tokens",
        "ffn_down.weight.token",
        "`blk.0.ffn_down.weight.tokens`: is missing",
    );
    check(
        "\"U64\",\"shape\":[2]",
        "\"I64\",\"shape\":[2]",
        "dtype must be U64, found I64",
    );
    check(
        "\"shape\":[6]",
        "\"shape\":[2,3]",
        "shape must be [2], found [2, 3]",
    );
    check(
        "\"shape\":[1,2]",
        "\"shape\":[2]",
        "must have two dimensions",
    );
    check("[2,2]", "[9,2]", "takes");
}

#[test]
fn lies_of_the_numbers() {
    let broken = |edit: fn(&mut Statistics)| {
        let mut statistics = some();
        edit(&mut statistics);
        bytes(&statistics)
    };
    refused(
        &broken(|s| s.residual[0].triangle = with(1, f64::NAN)),
        "`residual.0`: values must be finite",
    );
    refused(
        &broken(|s| s.residual[1].triangle = with(3, -1.0)),
        "`residual.1`: sums of squares must not be negative",
    );
    fn down(statistics: &mut Statistics) -> &mut InputSums {
        let matrices = statistics.inputs.get_mut("blk.0.ffn_down.weight").unwrap();
        matrices[0].as_mut().unwrap()
    }
    let expected = "`blk.0.ffn_down.weight`: values must be finite and not negative";
    refused(&broken(|s| down(s).squares[0] = -1.0), expected);
    refused(&broken(|s| down(s).max_abs[1] = f32::INFINITY), expected);
    refused(&broken(|s| down(s).weight = f64::NAN), expected);
    let cut = bytes(&some());
    refused(&cut[..cut.len() - 1], "truncated");
}

/// A finding of `statistics_read`: tensors that no token reached were read, and not written.
#[test]
fn sums_of_no_tokens() {
    let written = |tokens: u64| {
        let mut statistics = some();
        let all = statistics.inputs.get_mut("blk.0.ffn_up_exps.weight");
        all.unwrap()[1].as_mut().unwrap().tokens = tokens;
        bytes(&statistics)
    };
    refused(
        &written(0),
        "`blk.0.ffn_up_exps.weight`: no matrix of it saw a token",
    );
    let mut statistics = some();
    let all = statistics
        .inputs
        .get_mut("blk.0.ffn_up_exps.weight")
        .unwrap();
    let mut silent = all[1].clone();
    silent.as_mut().unwrap().tokens = 0;
    all[0] = silent;
    refused(&bytes(&statistics), "a matrix that saw no token has sums");
}

#[test]
fn other_models_and_other_samples_are_told_apart() {
    let samples = Samples {
        sequences: vec![vec![1, 2]],
    };
    let origin = Origin {
        samples_sha256: samples.digest(),
        ..origin()
    };
    let model = ["aa".to_owned(), "bb".to_owned()];
    origin.check(&model, &samples).unwrap();
    let message =
        |model: &[String], samples: &Samples| origin.check(model, samples).unwrap_err().to_string();
    let other = Samples {
        sequences: vec![vec![1, 3]],
    };
    assert!(message(&model[..1], &samples).contains("of another model: its sha256 is aa, bb"));
    assert!(message(&model, &other).contains("of other samples"));
}

#[test]
fn statistics_must_fit_the_model() {
    let model = StoredModel::open(nemoconv_fixtures::nano().to_str().unwrap()).unwrap();
    let message = some().check_model(&model).unwrap_err().to_string();
    assert!(
        message.contains("[2, 3], the model has [6, 256]"),
        "{message}"
    );
}

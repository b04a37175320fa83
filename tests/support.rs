//! What the tests share: running the binary, writing small checkpoints.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

/// The binary under test.
pub fn nemoconv<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nemoconv"))
        .args(args)
        .output()
        .expect("the binary starts")
}

/// Converts `model` to `outfile`; the test fails with the program's own words if that fails.
pub fn to_gguf(model: &Path, outfile: &Path, flags: &[&str]) {
    let output = try_to_gguf(model, outfile, flags);
    assert!(output.status.success(), "{}", stderr(&output));
}

/// The same, for conversions that may fail.
pub fn try_to_gguf(model: &Path, outfile: &Path, flags: &[&str]) -> Output {
    let fixed: [&OsStr; 5] = [
        "to-gguf".as_ref(),
        model.as_ref(),
        "-o".as_ref(),
        outfile.as_ref(),
        "-q".as_ref(),
    ];
    nemoconv(fixed.into_iter().chain(flags.iter().map(OsStr::new)))
}

/// A folder of a test, with a text in it.
pub struct Place {
    pub folder: TempDir,
    pub text: PathBuf,
}

impl Place {
    /// With a text of these bytes.
    pub fn new(text: impl AsRef<[u8]>) -> Self {
        let folder = tempdir().expect("there is a temporary folder");
        let path = folder.path().join("text.txt");
        std::fs::write(&path, text).expect("the text can be written");
        Self { folder, text: path }
    }

    /// A path in the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// Runs `validate` on a text.
pub fn validate(artifact: &Path, reference: &Path, text: &Path, flags: &[&str]) -> Output {
    let fixed: [&OsStr; 9] = [
        "-q".as_ref(),
        "validate".as_ref(),
        artifact.as_ref(),
        "--context".as_ref(),
        "128".as_ref(),
        "--reference".as_ref(),
        reference.as_ref(),
        "--text".as_ref(),
        text.as_ref(),
    ];
    nemoconv(fixed.into_iter().chain(flags.iter().map(OsStr::new)))
}

/// The JSON on a program's stdout.
pub fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", stderr(output)))
}

/// The mean KL divergence of a report of `validate`.
pub fn mean_kl(report: &Value) -> f64 {
    report["logits"]["kl_divergence"]["mean"]["value"]
        .as_f64()
        .unwrap_or_else(|| panic!("{}", report["logits"]["kl_divergence"]))
}

/// What the program said.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A copy of a model folder that a test may damage.
pub fn copy_of(model: &Path, to: &Path) -> PathBuf {
    let folder = to.join("model");
    std::fs::create_dir_all(&folder).expect("the folder can be made");
    for entry in std::fs::read_dir(model).expect("the model is there") {
        let path = entry.expect("the entry can be read").path();
        if path.is_file() {
            let copy = folder.join(path.file_name().expect("a file has a name"));
            std::fs::write(copy, std::fs::read(&path).expect("the file can be read"))
                .expect("it can be written");
        }
    }
    folder
}

/// Rewrites `config.json` of a copied model.
pub fn edit_config(folder: &Path, edit: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let text = std::fs::read_to_string(&path)
        .expect("config.json is there")
        .replace("Infinity", "1e30");
    let mut config = serde_json::from_str(&text).expect("config.json is JSON");
    edit(&mut config);
    std::fs::write(path, config.to_string()).expect("config.json can be written");
}

/// A safetensors file held in memory: name to dtype, shape, bytes.
pub type Tensors = BTreeMap<String, (String, Vec<usize>, Vec<u8>)>;

/// Reads a whole safetensors file.
pub fn read_tensors(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).expect("the file can be read");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("the file is safetensors");
    tensors
        .iter()
        .map(|(name, view)| {
            let dtype = serde_json::to_value(view.dtype()).expect("dtypes have names");
            let dtype = dtype.as_str().expect("names are text").to_string();
            (
                name.to_string(),
                (dtype, view.shape().to_vec(), view.data().to_vec()),
            )
        })
        .collect()
}

/// Writes a safetensors file.
pub fn write_tensors(path: &Path, tensors: &Tensors) {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, (dtype, shape, bytes)) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(
            name.clone(),
            json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets }),
        );
        data.extend_from_slice(bytes);
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    std::fs::write(path, file).expect("the file can be written");
}

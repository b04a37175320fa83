//! What a command reads must be there, and must outlive what it writes: both are seen to before the work.

use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nemoconv::error::{Error, Fault, Result};
use nemoconv::formats;

/// What is read of a model's folder, by its ending: artifacts and reports may lie there and be made anew.
const OF_MODELS: [&str; 5] = ["safetensors", "json", "txt", "jinja", "model"];

/// Refuses an output that is one of the inputs, which are files or folders of models.
pub fn spare(inputs: &[Option<&Path>], outputs: &[Option<&Path>]) -> Result<()> {
    for output in outputs.iter().flatten() {
        let Ok(found) = fs::metadata(output) else {
            continue;
        };
        if inputs.iter().flatten().any(|input| holds(input, &found)) {
            let fault = Fault::new("is an input of this command").in_file(output);
            return Err(Error::Plan(fault.hint("name another file to write")));
        }
    }
    Ok(())
}

/// Refuses flags that name what is not there.
pub fn require(inputs: &[(&str, Option<&Path>)]) -> Result<()> {
    let given = inputs
        .iter()
        .filter_map(|(flag, path)| Some((flag, (*path)?)));
    for (flag, path) in given {
        if fs::metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound) {
            let what = format!("there is no such file or folder, named by `{flag}`");
            return Err(formats::Error::missing(what).in_file(path).into());
        }
    }
    Ok(())
}

fn holds(input: &Path, file: &Metadata) -> bool {
    let is_it = |path: &Path| {
        fs::metadata(path).is_ok_and(|own| own.dev() == file.dev() && own.ino() == file.ino())
    };
    let entries = fs::read_dir(input).into_iter().flatten().flatten();
    let mut paths = entries.map(|entry| entry.path());
    is_it(input) || paths.any(|path| is_read(&path) && is_it(&path))
}

fn is_read(path: &Path) -> bool {
    let ending = path.extension().and_then(|ending| ending.to_str());
    ending.is_some_and(|ending| OF_MODELS.contains(&ending))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_named_with_its_flag() {
        let here = Some(Path::new("."));
        assert!(require(&[("--text", here), ("--gates", None)]).is_ok());
        let error = require(&[("--text", here), ("--gates", Some(Path::new("/nope")))]);
        let said = error.unwrap_err().to_string();
        assert!(
            said.contains("`--gates`") && said.contains("/nope"),
            "{said}"
        );
    }

    #[test]
    fn files_and_folders_of_models_are_spared() {
        let folder = tempfile::tempdir().unwrap();
        let [model, text] = ["model", "text.txt"].map(|name| folder.path().join(name));
        fs::create_dir(&model).unwrap();
        let weights = model.join("model.safetensors");
        fs::write(&weights, "weights").unwrap();
        fs::write(&text, "text").unwrap();
        let inputs = [Some(model.as_path()), None, Some(text.as_path())];
        let spares = |output: &Path| spare(&inputs, &[None, Some(output)]).is_ok();
        assert!(!spares(&weights) && !spares(&text));
        assert!(!spares(&model.join("../model/./model.safetensors")));
        let artifact = model.join("model.gguf");
        assert!(spares(&artifact));
        fs::write(&artifact, "of an earlier run").unwrap();
        assert!(spares(&artifact) && spares(folder.path()));
    }
}

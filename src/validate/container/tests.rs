use super::*;
use crate::report::Severity;

/// Inspects a copy of the nano model with one file changed.
fn check(change: impl FnOnce(&Path), expected: &[(&str, Option<&str>)]) {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(nemoconv_fixtures::nano()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    change(folder.path());
    let findings = inspect(folder.path()).unwrap().into_findings();
    let found: Vec<_> = findings
        .iter()
        .map(|finding| (finding.rule.id(), finding.place.tensor.as_deref()))
        .collect();
    assert_eq!(found, expected, "{findings:?}");
    assert!(findings.iter().all(|f| f.severity == Severity::Error));
}

fn edit_config(folder: &Path, from: &str, to: &str) {
    let path = folder.join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    std::fs::write(path, text.replacen(from, to, 1)).unwrap();
}

#[test]
fn a_whole_folder_has_no_findings() {
    check(|_| (), &[]);
}

#[test]
fn a_folder_is_held_against_its_config() {
    check(
        |folder| std::fs::remove_file(folder.join("config.json")).unwrap(),
        &[("container/missing-key", None)],
    );
    check(
        |folder| edit_config(folder, "NemotronHForCausalLM", "LlamaForCausalLM"),
        &[("container/unsupported-architecture", None)],
    );
    check(
        |folder| edit_config(folder, "\"M-M*-\"", "\"M-M*-*\""),
        &[("container/contradicting-key", None)],
    );
    check(
        |folder| {
            edit_config(folder, "\"M-M*-\"", "\"M-M*-*\"");
            edit_config(
                folder,
                "\"num_hidden_layers\": 5",
                "\"num_hidden_layers\": 6",
            );
        },
        &[
            ("container/missing-tensor", Some("layers.5.norm.weight")),
            (
                "container/missing-tensor",
                Some("layers.5.mixer.q_proj.weight"),
            ),
            (
                "container/missing-tensor",
                Some("layers.5.mixer.k_proj.weight"),
            ),
            (
                "container/missing-tensor",
                Some("layers.5.mixer.v_proj.weight"),
            ),
            (
                "container/missing-tensor",
                Some("layers.5.mixer.o_proj.weight"),
            ),
        ],
    );
}

#[test]
fn a_cut_shard_is_unreadable() {
    check(
        |folder| {
            let path = folder.join("model.safetensors");
            let bytes = std::fs::read(&path).unwrap();
            std::fs::write(path, &bytes[..bytes.len() - 10]).unwrap();
        },
        &[("container/unreadable", Some("lm_head.weight"))],
    );
}

#[test]
fn an_absent_artifact_is_an_error() {
    for path in ["/nonexistent/model.gguf", "/nonexistent/model"] {
        assert!(inspect(Path::new(path)).is_err(), "{path}");
    }
}

//! Chat templates: the bytes of the reference, parsed, and the same prompts from both.
//!
//! Enters: the keys of both sides. Leaves: findings.

use std::collections::BTreeSet;

use nemoconv_formats::gguf::Value;

use super::conversations::conversations;
use super::{Found, Side};
use crate::model::tokenizer::chat_render::Template;
use crate::report::{Rule, Severity};

const KEY: &str = "tokenizer.chat_template";

pub fn inspect(artifact: &Side, reference: Option<&Side>, found: &mut Found) {
    let mut keys: BTreeSet<String> = template_keys(artifact).collect();
    keys.extend(reference.into_iter().flat_map(template_keys));
    if keys.is_empty() {
        found.push(artifact.finding(Rule::NoChatTemplate, KEY, "there is no chat template"));
    }
    for key in &keys {
        template(key, artifact, reference, found);
    }
    found.looked_at("chat templates", keys.len());
}

fn template_keys(side: &Side) -> impl Iterator<Item = String> {
    let entries = side.keys.iter();
    entries
        .filter(|(key, value)| {
            let own = *key == KEY || key.starts_with("tokenizer.chat_template.");
            own && matches!(value, Value::String(_))
        })
        .map(|(key, _)| key.to_owned())
}

fn template(key: &str, artifact: &Side, reference: Option<&Side>, found: &mut Found) {
    let ours = artifact.text(key);
    let theirs = reference.and_then(|reference| reference.text(key));
    let Some(ours) = ours else {
        let bytes = theirs.map_or(0, str::len);
        let message = format!("is missing, the reference has one of {bytes} bytes");
        found.push(artifact.finding(Rule::ChatTemplateDiffers, key, message));
        return;
    };
    if reference.is_some() {
        compare(key, ours, theirs, artifact, found);
    }
    let same = theirs == Some(ours);
    let parsed = match Template::parse(ours) {
        Ok(parsed) => parsed,
        Err(error) => {
            let finding = artifact.finding(Rule::ChatTemplateInvalid, key, error);
            // The engine here may know less than the one the model was made for.
            let severity = match same {
                true => Severity::Note,
                false => Severity::Error,
            };
            found.push(finding.severity(severity));
            return;
        }
    };
    let render = |template: &Template, side: &Side| -> Vec<Result<String, String>> {
        let (bos, eos) = (token(side, "bos"), token(side, "eos"));
        let all = conversations().into_iter();
        all.map(|c| template.render(&c, bos, eos)).collect()
    };
    let prompts = render(&parsed, artifact);
    if let Some(error) = prompts[0]
        .as_ref()
        .err()
        .filter(|_| prompts.iter().all(Result::is_err))
    {
        let message = format!("no conversation can be laid out: {error}");
        let finding = artifact.finding(Rule::ChatTemplateInvalid, key, message);
        let severity = match same {
            true => Severity::Note,
            false => Severity::Warning,
        };
        found.push(finding.severity(severity));
    }
    let (Some(reference), Some(theirs)) = (reference, theirs) else {
        return;
    };
    let Ok(other) = Template::parse(theirs) else {
        return;
    };
    let others = render(&other, reference);
    let differing = prompts.iter().zip(&others).position(|(a, b)| a != b);
    if let Some(index) = differing {
        let message = format!(
            "conversation {} of {} is laid out differently: {}",
            index + 1,
            prompts.len(),
            prompt_difference(&prompts[index], &others[index])
        );
        found.push(artifact.finding(Rule::ChatTemplateDiffers, key, message));
    }
}

fn compare(key: &str, ours: &str, theirs: Option<&str>, artifact: &Side, found: &mut Found) {
    let Some(theirs) = theirs else {
        let message = "the reference has no such template";
        let finding = artifact.finding(Rule::ChatTemplateDiffers, key, message);
        found.push(finding.severity(Severity::Warning));
        return;
    };
    if ours == theirs {
        return;
    }
    if theirs.starts_with(ours.trim_end()) {
        let message = format!(
            "ends after {} of {} bytes of the reference's template",
            ours.len(),
            theirs.len()
        );
        found.push(artifact.finding(Rule::ChatTemplateCut, key, message));
        return;
    }
    let same = ours.bytes().zip(theirs.bytes());
    let same = same.take_while(|(a, b)| a == b).count();
    let message = format!(
        "differs from the reference's from byte {same} on ({} and {} bytes)",
        ours.len(),
        theirs.len()
    );
    found.push(artifact.finding(Rule::ChatTemplateDiffers, key, message));
}

fn prompt_difference(ours: &Result<String, String>, theirs: &Result<String, String>) -> String {
    let excerpt = |prompt: &Result<String, String>, from: usize| match prompt {
        Ok(text) => format!("{:?}", text.chars().skip(from).take(32).collect::<String>()),
        Err(error) => error.clone(),
    };
    let same = match (ours, theirs) {
        (Ok(a), Ok(b)) => a.chars().zip(b.chars()).take_while(|(a, b)| a == b).count(),
        _ => 0,
    };
    format!(
        "{}, the reference has {}",
        excerpt(ours, same),
        excerpt(theirs, same)
    )
}

/// The text of a special token; empty where there is none, as in transformers.
fn token<'a>(side: &'a Side, role: &str) -> &'a str {
    let Some(Value::U32(id)) = side.keys.get(&format!("tokenizer.ggml.{role}_token_id")) else {
        return "";
    };
    let tokens = side.texts("tokenizer.ggml.tokens");
    tokens.get(*id as usize).map_or("", String::as_str)
}

//! What a check can find: one table of stable ids for all levels, and one thing found with its place.
//!
//! Enters: facts from the levels of `validate`. Leaves: [`Finding`]s that every renderer shows alike. Checks nothing.

use std::fmt;

use nemoconv_formats::Place;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The four levels of a validation, in the order they run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// The file as a container: offsets, names, shapes, keys.
    Container,
    /// The stored weights against those they were made from.
    Weights,
    /// Token ids, vocabulary, chat template.
    Tokenizer,
    /// What the network computes.
    Logits,
}

impl Level {
    /// All levels, in order.
    pub const ALL: [Self; 4] = [
        Self::Container,
        Self::Weights,
        Self::Tokenizer,
        Self::Logits,
    ];

    /// As it is spelled in ids and flags.
    pub fn name(self) -> &'static str {
        match self {
            Self::Container => "container",
            Self::Weights => "weights",
            Self::Tokenizer => "tokenizer",
            Self::Logits => "logits",
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How much a finding matters; ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing.
    Note,
    /// Probably not what was meant.
    Warning,
    /// The artifact is wrong.
    Error,
}

impl Severity {
    /// As SARIF and the flags spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

macro_rules! rules {
    ($($rule:ident: $level:ident, $severity:ident, $id:literal, $title:literal, $help:literal;)*) => {
        /// Something that a level checks. Its id is stable: gates, suppressions and dashboards refer to it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum Rule { $(#[doc = $title] $rule,)* }

        impl Rule {
            /// Every rule, by level.
            pub const ALL: &[Self] = &[$(Self::$rule,)*];

            /// Stable: the level, a slash, a slug.
            pub fn id(self) -> &'static str {
                match self { $(Self::$rule => $id,)* }
            }

            /// The level that checks it.
            pub fn level(self) -> Level {
                match self { $(Self::$rule => Level::$level,)* }
            }

            /// The severity of its findings unless the check says otherwise.
            pub fn severity(self) -> Severity {
                match self { $(Self::$rule => Severity::$severity,)* }
            }

            /// What is wrong, as a headline.
            pub fn title(self) -> &'static str {
                match self { $(Self::$rule => $title,)* }
            }

            /// What it means and what can be done.
            pub fn help(self) -> &'static str {
                match self { $(Self::$rule => $help,)* }
            }
        }
    };
}

rules! {
    Unreadable: Container, Error, "container/unreadable",
        "the file cannot be parsed",
        "The header contradicts the format or the file ends early. Download or convert it again.";
    OffsetOutsideFile: Container, Error, "container/offset-outside-file",
        "tensor data lies outside the file",
        "An offset plus the size of its tensor is larger than the file. The file is cut short or its header is wrong.";
    OverlappingTensors: Container, Error, "container/overlapping-tensors",
        "two tensors share bytes",
        "Runtimes would read the bytes of one tensor as the other. The writer laid them out wrongly.";
    MisalignedTensor: Container, Error, "container/misaligned-tensor",
        "tensor data is not aligned",
        "GGUF asks every offset to be a multiple of `general.alignment`; memory-mapping runtimes refuse or crash.";
    GapBetweenTensors: Container, Warning, "container/gap-between-tensors",
        "unused bytes lie between tensors",
        "More bytes than padding needs. They may hide a tensor that the header no longer names.";
    TrailingBytes: Container, Warning, "container/trailing-bytes",
        "bytes follow the last tensor",
        "The file was appended to, or its header names too few tensors.";
    MissingTensor: Container, Error, "container/missing-tensor",
        "a tensor of the architecture is missing",
        "The runtime refuses to load the model, or runs it without that part.";
    UnknownTensor: Container, Warning, "container/unknown-tensor",
        "a tensor that the architecture does not have",
        "Runtimes ignore or refuse it. Often a name that was mapped wrongly.";
    DuplicateTensor: Container, Error, "container/duplicate-tensor",
        "a tensor name is used twice",
        "Which of the two is loaded depends on the runtime.";
    WrongShape: Container, Error, "container/wrong-shape",
        "a tensor has not the shape that the configuration asks for",
        "Rows and columns follow from the configuration. A transposed or padded tensor looks like this.";
    UnexpectedType: Container, Warning, "container/unexpected-type",
        "a tensor is stored in a type that runtimes do not expect there",
        "Norms, SSM parameters and convolutions stay in float types; some runtimes read them as nothing else.";
    PackedLinear: Container, Error, "container/packed-linear",
        "a packed linear is incomplete or contradicts its scheme",
        "Codes, scales, zero points and sizes of one module belong together. Runtimes refuse the folder, or leave the module at random values.";
    QuantizationConfig: Container, Error, "container/quantization-config",
        "the quantization configuration does not fit the weights",
        "Every linear is either packed or listed in `ignore`. Runtimes read the others as noise, or refuse the folder.";
    SplitPartMissing: Container, Error, "container/split-part-missing",
        "a part of a split model is missing",
        "All parts `-00001-of-0000N` lie in one folder. Download the missing part.";
    TooManyTensors: Container, Error, "container/too-many-tensors",
        "more tensors than the header announces or the runtime accepts",
        "Runtimes cap the number of tensors per file. Split the model or raise the cap of the runtime.";
    MissingKey: Container, Error, "container/missing-key",
        "a metadata key is missing",
        "Runtimes refuse the file or fall back to a default that does not fit this model.";
    WrongKeyType: Container, Error, "container/wrong-key-type",
        "a metadata key has the wrong type",
        "Runtimes that ask for the right type refuse the file.";
    ContradictingKey: Container, Error, "container/contradicting-key",
        "a metadata key contradicts the configuration",
        "The model is loaded as another network than it is.";
    UnsupportedArchitecture: Container, Error, "container/unsupported-architecture",
        "the file holds a model of another architecture",
        "Only Nemotron-H hybrids are known here: `nemotron_h` and `nemotron_h_moe`.";

    DifferentModels: Weights, Error, "weights/different-models",
        "artifact and reference are different models",
        "Their sizes or nearly all of their weights differ. Give the model that the artifact was made from.";
    NotFinite: Weights, Error, "weights/not-finite",
        "a weight is NaN or infinite",
        "One such weight makes every logit NaN. If the source is finite, the scale overflowed its float type.";
    ScaleOutOfRange: Weights, Error, "weights/scale-out-of-range",
        "a block scale is NaN, infinite, or far outside the range of the weights",
        "The block decodes to values that the tensor never had.";
    Saturation: Weights, Warning, "weights/saturation",
        "many weights sit at the end of the code range",
        "The scale is too small and large weights are clipped.";
    ErrorAboveExpectation: Weights, Warning, "weights/error-above-expectation",
        "the error of a tensor is larger than its type explains",
        "Compare with tensors of the same type. Outlier channels, or a scale search that went wrong.";
    PermutedRowsSuspected: Weights, Error, "weights/permuted-rows-suspected",
        "rows match the reference in another order",
        "Heads, groups or experts were reordered. The values are right, the network is not.";
    MissingExpert: Weights, Error, "weights/missing-expert",
        "an expert of a stack is missing or empty",
        "Tokens routed to it get zeros.";
    BytesDiffer: Weights, Error, "weights/bytes-differ",
        "tensors that should be equal differ",
        "A tensor that is stored without loss does not have the bytes of its source.";
    BiasAbsorbed: Weights, Note, "weights/bias-absorbed",
        "a bias was changed on purpose",
        "The artifact records that biases took back the mean rounding errors of the matrix before them (`--bias-absorption`). A change of half the bias or more is a warning.";
    RewritesMissing: Weights, Warning, "weights/rewrites-missing",
        "the rewrites that the artifact records cannot be had",
        "Its weights are those of a rewritten network and can only be compared through the sidecar that was written with it: `NAME.rewrites.safetensors` beside a GGUF file, `rewrites.nemoconv` with `receipt.json` in a packed folder. Put back what is missing.";
    NotComparable: Weights, Note, "weights/not-comparable",
        "a tensor has no counterpart in the reference",
        "It was merged, rewritten, or is absent on one side, so its error cannot be measured.";

    TokenIdsDiffer: Tokenizer, Error, "tokenizer/token-ids-differ",
        "the same text becomes other token ids",
        "The model sees another prompt than it was trained on.";
    VocabularyDiffers: Tokenizer, Error, "tokenizer/vocabulary-differs",
        "the vocabularies differ",
        "A token stands for another text, or is absent.";
    WrongPreTokenizer: Tokenizer, Error, "tokenizer/wrong-pre-tokenizer",
        "the pre-tokenizer is not that of the model",
        "Text is cut differently before merges are applied. `tokenizer.ggml.pre` names it.";
    SpecialIdDiffers: Tokenizer, Error, "tokenizer/special-id-differs",
        "a special token has another id",
        "Generation starts or stops at the wrong token.";
    ChatTemplateCut: Tokenizer, Error, "tokenizer/chat-template-cut",
        "the chat template is cut short",
        "The stored template is a prefix of the original.";
    ChatTemplateDiffers: Tokenizer, Error, "tokenizer/chat-template-differs",
        "the chat template differs",
        "Prompts are laid out differently from what the model was trained on.";
    ChatTemplateInvalid: Tokenizer, Error, "tokenizer/chat-template-invalid",
        "the chat template does not parse",
        "Chat endpoints refuse to start or fall back to another template.";
    NoChatTemplate: Tokenizer, Note, "tokenizer/no-chat-template",
        "there is no chat template",
        "Chat endpoints fall back to a template of their own. Base models are published like this.";

    NonFiniteLogits: Logits, Error, "logits/not-finite",
        "the network computes logits that are not numbers",
        "A weight, a scale or an activation overflows. The positions concerned are left out of every mean.";
    KlAboveGate: Logits, Error, "logits/kl-above-gate",
        "the KL divergence is above its gate",
        "The artifact predicts other tokens than the reference. Use a larger type, or give the worst layers more bits.";
    Top1BelowGate: Logits, Error, "logits/top1-below-gate",
        "the top-1 agreement is below its gate",
        "Greedy decoding takes another token too often.";
    PerplexityAboveGate: Logits, Error, "logits/perplexity-above-gate",
        "the perplexity ratio is above its gate",
        "The artifact is more surprised by the text than the reference.";
    LayerErrorAboveGate: Logits, Error, "logits/layer-error-above-gate",
        "the relative error of a layer is above its gate",
        "The output of that layer has moved too far from the reference.";
    StateDriftAboveGate: Logits, Error, "logits/state-drift-above-gate",
        "the error of an SSM state is above its gate",
        "Scan errors pile up over time. Long prompts suffer most.";
    RoutingAboveGate: Logits, Error, "logits/routing-above-gate",
        "the share of tokens with other experts is above its gate",
        "The router or its input lost too much precision.";
    LayerDriftOutlier: Logits, Warning, "logits/layer-drift-outlier",
        "one layer adds far more error than its neighbours",
        "Look at the tensors of that layer: a wrong scale, an outlier channel, or a type that is too small.";
    StateDriftGrows: Logits, Warning, "logits/state-drift-grows",
        "the error of an SSM head grows with time",
        "Measure a longer context. Keep `ssm_in` and the SSM parameters of that layer in a larger type.";
    ExpertRoutingChanges: Logits, Warning, "logits/expert-routing-changes",
        "many tokens are routed to other experts",
        "Keep the router in F32 and give the tensors before it more bits.";
}

impl Rule {
    /// The rule with this id.
    pub fn of_id(id: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|rule| rule.id() == id)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.id())
    }
}

impl Serialize for Rule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.id())
    }
}

impl<'de> Deserialize<'de> for Rule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let id = String::deserialize(deserializer)?;
        Self::of_id(&id).ok_or_else(|| de::Error::custom(format!("no finding has the id `{id}`")))
    }
}

/// Where something was found, as far as that applies.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FindingPlace {
    /// The file, as the user named it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// The tensor or metadata key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tensor: Option<String>,
    /// Index of the block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer: Option<usize>,
    /// Byte offset in the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
}

impl From<&Place> for FindingPlace {
    fn from(place: &Place) -> Self {
        Self {
            file: place.path.as_ref().map(|path| path.display().to_string()),
            tensor: place.tensor.clone(),
            layer: None,
            offset: place.offset,
        }
    }
}

impl fmt::Display for FindingPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layer = self.layer.map(|layer| format!("layer {layer}"));
        let offset = self.offset.map(|offset| format!("at {offset:#x}"));
        let parts = [&self.tensor, &layer, &self.file, &offset];
        let parts: Vec<_> = parts.into_iter().flatten().map(String::as_str).collect();
        f.write_str(&parts.join(" "))
    }
}

/// One thing found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Finding {
    /// What kind of thing.
    #[serde(rename = "id")]
    pub rule: Rule,
    /// How much it matters here.
    pub severity: Severity,
    /// The fact with its figures: lower case, no full stop.
    pub message: String,
    /// Where.
    #[serde(default)]
    pub place: FindingPlace,
}

impl Finding {
    /// A finding of the rule's own severity, without a place.
    pub fn new(rule: Rule, message: impl Into<String>) -> Self {
        Self {
            rule,
            severity: rule.severity(),
            message: message.into(),
            place: FindingPlace::default(),
        }
    }

    /// Changes the severity.
    pub fn severity(mut self, severity: Severity) -> Self {
        self.severity = severity;
        self
    }

    /// Names the file.
    pub fn in_file(mut self, file: impl Into<String>) -> Self {
        self.place.file = Some(file.into());
        self
    }

    /// Names the tensor or key.
    pub fn in_tensor(mut self, tensor: impl Into<String>) -> Self {
        self.place.tensor = Some(tensor.into());
        self
    }

    /// Gives the block index.
    pub fn in_layer(mut self, layer: usize) -> Self {
        self.place.layer = Some(layer);
        self
    }

    /// Gives the byte offset.
    pub fn at(mut self, offset: u64) -> Self {
        self.place.offset = Some(offset);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_unique_and_begin_with_their_level() {
        let mut ids: Vec<_> = Rule::ALL.iter().map(|rule| rule.id()).collect();
        for rule in Rule::ALL {
            let slug = rule.id().strip_prefix(rule.level().name()).unwrap();
            let well_spelled = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            assert!(slug[1..].chars().all(well_spelled), "{slug}");
            assert_eq!(Rule::of_id(rule.id()), Some(*rule));
            assert!(rule.help().ends_with('.'), "{rule}");
        }
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), Rule::ALL.len());
    }

    #[test]
    fn a_finding_survives_json() {
        let finding = Finding::new(Rule::WrongShape, "expected [2, 3], found [3, 2]")
            .severity(Severity::Warning)
            .in_file("a.gguf")
            .in_tensor("blk.0.ssm_in.weight")
            .in_layer(0)
            .at(64);
        let json = serde_json::to_string(&finding).unwrap();
        assert_eq!(serde_json::from_str::<Finding>(&json).unwrap(), finding);
        assert_eq!(
            finding.place.to_string(),
            "blk.0.ssm_in.weight layer 0 a.gguf at 0x40"
        );
        let error = serde_json::from_str::<Finding>(&json.replace("wrong-shape", "wrong-colour"));
        assert!(error.unwrap_err().to_string().contains("wrong-colour"));
    }
}

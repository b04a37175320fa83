//! The named file types of `--outtype`: base tensor type, `general.file_type` id, spelling.

use std::{fmt, str::FromStr};

use nemoconv_formats::GgmlType;

/// What the user asks for by name; llama.cpp's `llama_ftype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(
    missing_docs,
    non_camel_case_types,
    reason = "the names are llama.cpp's"
)]
pub enum FileType {
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q2_K,
    Q2_K_S,
    Q3_K_S,
    Q3_K_M,
    Q3_K_L,
    Q4_K_S,
    Q4_K_M,
    Q5_K_S,
    Q5_K_M,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
    MXFP4_MOE,
    TQ1_0,
    TQ2_0,
}

/// Type, name, id in `general.file_type`, base tensor type.
const TABLE: &[(FileType, &str, u32, GgmlType)] = {
    use FileType as F;
    use GgmlType as T;
    &[
        (F::F32, "F32", 0, T::F32),
        (F::F16, "F16", 1, T::F16),
        (F::Q4_0, "Q4_0", 2, T::Q4_0),
        (F::Q4_1, "Q4_1", 3, T::Q4_1),
        (F::Q8_0, "Q8_0", 7, T::Q8_0),
        (F::Q5_0, "Q5_0", 8, T::Q5_0),
        (F::Q5_1, "Q5_1", 9, T::Q5_1),
        (F::Q2_K, "Q2_K", 10, T::Q2_K),
        (F::Q3_K_S, "Q3_K_S", 11, T::Q3_K),
        (F::Q3_K_M, "Q3_K_M", 12, T::Q3_K),
        (F::Q3_K_L, "Q3_K_L", 13, T::Q3_K),
        (F::Q4_K_S, "Q4_K_S", 14, T::Q4_K),
        (F::Q4_K_M, "Q4_K_M", 15, T::Q4_K),
        (F::Q5_K_S, "Q5_K_S", 16, T::Q5_K),
        (F::Q5_K_M, "Q5_K_M", 17, T::Q5_K),
        (F::Q6_K, "Q6_K", 18, T::Q6_K),
        (F::Q2_K_S, "Q2_K_S", 21, T::Q2_K),
        (F::IQ4_NL, "IQ4_NL", 25, T::IQ4_NL),
        (F::IQ4_XS, "IQ4_XS", 30, T::IQ4_XS),
        (F::BF16, "BF16", 32, T::BF16),
        (F::TQ1_0, "TQ1_0", 36, T::TQ1_0),
        (F::TQ2_0, "TQ2_0", 37, T::TQ2_0),
        (F::MXFP4_MOE, "MXFP4_MOE", 38, T::MXFP4),
    ]
};

/// Other spellings, as llama-quantize accepts them.
const ALIASES: &[(&str, FileType)] = &[
    ("Q3_K", FileType::Q3_K_M),
    ("Q4_K", FileType::Q4_K_M),
    ("Q5_K", FileType::Q5_K_M),
    ("MXFP4", FileType::MXFP4_MOE),
];

impl FileType {
    /// Every file type, in order of id.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|row| row.0)
    }

    fn row(self) -> &'static (Self, &'static str, u32, GgmlType) {
        TABLE
            .iter()
            .find(|row| row.0 == self)
            .expect("the table lists every variant")
    }

    /// llama.cpp's name, such as `Q4_K_M`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// The value of `general.file_type`.
    pub fn id(self) -> u32 {
        self.row().2
    }

    /// The file type with this id, if it is known.
    pub fn of_id(id: u32) -> Option<Self> {
        TABLE.iter().find(|row| row.2 == id).map(|row| row.0)
    }

    /// The file type of a file without a name of its own: that of the tensor type which most weights have; of several the
    /// middle one.
    pub fn of_most(tensors: impl Iterator<Item = (GgmlType, u64)>) -> Self {
        let mut weights: Vec<(GgmlType, u64)> = Vec::new();
        for (ty, count) in tensors {
            match weights.iter_mut().find(|(seen, _)| *seen == ty) {
                Some((_, sum)) => *sum += count,
                None => weights.push((ty, count)),
            }
        }
        let most = weights.iter().rev().max_by_key(|(_, sum)| *sum);
        let named = |ty: GgmlType| {
            let alias = ALIASES.iter().find(|row| row.0 == ty.name());
            let exact = || Self::all().find(|file_type| file_type.name() == ty.name());
            let base = || Self::all().find(|file_type| file_type.base() == ty);
            alias.map(|row| row.1).or_else(exact).or_else(base)
        };
        most.and_then(|(ty, _)| named(*ty)).unwrap_or(Self::F32)
    }

    /// The tensor type that most weights take.
    pub fn base(self) -> GgmlType {
        self.row().3
    }

    /// Whether weights are stored as plain floats.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }
}

impl fmt::Display for FileType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for FileType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = TABLE
            .iter()
            .find(|row| row.1.eq_ignore_ascii_case(text))
            .map(|row| row.0);
        let alias = ALIASES
            .iter()
            .find(|row| row.0.eq_ignore_ascii_case(text))
            .map(|row| row.1);
        named.or(alias).ok_or_else(|| {
            let names: Vec<_> = Self::all().map(Self::name).collect();
            format!(
                "`{text}` is not a file type; choose one of {}",
                names.join(", ")
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_a_name_is_called_after_most_of_its_weights() {
        let check = |tensors: &[(GgmlType, u64)], expected| {
            assert_eq!(FileType::of_most(tensors.iter().copied()), expected);
        };
        use GgmlType as T;
        check(
            &[(T::Q4_K, 5), (T::Q8_0, 8), (T::Q4_K, 4)],
            FileType::Q4_K_M,
        );
        check(&[(T::IQ4_NL, 5), (T::F32, 1)], FileType::IQ4_NL);
        check(&[(T::Q2_K, 1)], FileType::Q2_K);
        check(&[(T::MXFP4, 1)], FileType::MXFP4_MOE);
        check(&[], FileType::F32);
    }

    #[test]
    fn names_are_case_insensitive_and_aliases_mean_medium() {
        assert_eq!("q4_k".parse(), Ok(FileType::Q4_K_M));
        assert_eq!("mxfp4".parse(), Ok(FileType::MXFP4_MOE));
        for file_type in FileType::all() {
            assert_eq!(file_type.name().to_lowercase().parse(), Ok(file_type));
        }
        assert!("q9_0".parse::<FileType>().unwrap_err().contains("Q4_K_M"));
    }
}

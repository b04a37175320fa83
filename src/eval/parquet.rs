//! Rows of a Parquet file as JSON objects.
//!
//! Enters: a file with flat, list and struct columns. Leaves: [`Document`]s. Knows no task.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::{Map, Value, json};

use super::document::{Document, bad_row};
use crate::error::{Error, Fault, Result};

/// Appends every row of `path`.
///
/// # Errors
/// A file that cannot be read or is not Parquet, a column type that benchmarks do not have.
pub(super) fn read_rows(path: &Path, file: usize, documents: &mut Vec<Document>) -> Result<()> {
    let handle = File::open(path)
        .map_err(|error| Error::from(nemoconv_formats::Error::from(error).in_file(path)))?;
    // The decoder asserts in places what a damaged file need not keep.
    let rows = catch_unwind(AssertUnwindSafe(|| rows_of(handle)))
        .map_err(|_| damaged(path, "its pages do not match its schema"))?
        .map_err(|error| damaged(path, &error.to_string()))?;
    for (index, row) in rows.iter().enumerate() {
        let line = index + 1;
        let fields = object(row).map_err(|what| bad_row(path, line, &what))?;
        documents.push(Document { fields, file, line });
    }
    Ok(())
}

fn rows_of(handle: File) -> std::result::Result<Vec<Row>, ParquetError> {
    SerializedFileReader::new(handle)?
        .get_row_iter(None)?
        .collect()
}

fn damaged(path: &Path, what: &str) -> Error {
    let fault = Fault::new(format!("not a readable Parquet file: {what}"))
        .in_file(path)
        .hint("export the split again, or as one JSON object per line");
    Error::Data(fault)
}

fn object(row: &Row) -> std::result::Result<Map<String, Value>, String> {
    row.get_column_iter()
        .map(|(name, field)| Ok((name.clone(), value(field)?)))
        .collect()
}

fn value(field: &Field) -> std::result::Result<Value, String> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => json!(value),
        Field::Byte(value) => json!(value),
        Field::Short(value) => json!(value),
        Field::Int(value) => json!(value),
        Field::Long(value) => json!(value),
        Field::UByte(value) => json!(value),
        Field::UShort(value) => json!(value),
        Field::UInt(value) => json!(value),
        Field::ULong(value) => json!(value),
        Field::Float(value) => json!(f64::from(*value)),
        Field::Double(value) => json!(value),
        Field::Str(value) => json!(value),
        Field::Group(row) => Value::Object(object(row)?),
        Field::ListInternal(list) => {
            let elements: std::result::Result<Vec<_>, _> =
                list.elements().iter().map(value).collect();
            Value::Array(elements?)
        }
        other => {
            return Err(format!(
                "a column has values like {other}, which are not text, numbers, lists or structs"
            ));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::document::DataSet;
    use crate::eval::tasks::Task;
    use parquet::basic::{Compression, ZstdLevel};
    use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    use std::sync::Arc;

    const SCHEMA: &str = "message rows {
        optional binary question (UTF8);
        optional group choices {
            optional group text (LIST) { repeated group list { optional binary element (UTF8); } }
        }
        optional int64 label;
    }";

    /// Two rows: ("q é", ["a", "b"], 1) and (null, [], null).
    fn write(path: &Path, compression: Compression) {
        let schema = Arc::new(parse_message_type(SCHEMA).unwrap());
        let properties = WriterProperties::builder()
            .set_compression(compression)
            .build();
        let file = File::create(path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let texts = |texts: &[&str]| -> Vec<_> {
            texts.iter().map(|text| ByteArray::from(*text)).collect()
        };
        let mut column = group.next_column().unwrap().unwrap();
        let typed = column.typed::<ByteArrayType>();
        typed
            .write_batch(&texts(&["q é"]), Some(&[1, 0]), None)
            .unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let typed = column.typed::<ByteArrayType>();
        typed
            .write_batch(&texts(&["a", "b"]), Some(&[4, 4, 2]), Some(&[0, 1, 0]))
            .unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let typed = column.typed::<Int64Type>();
        typed.write_batch(&[1], Some(&[1, 0]), None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();
    }

    #[test]
    fn rows_are_those_of_the_same_jsonl() {
        for compression in [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::GZIP(Default::default()),
            Compression::ZSTD(ZstdLevel::default()),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let place = folder.path().join("ARC-Easy");
            std::fs::create_dir(&place).unwrap();
            write(&place.join("test-00000-of-00002.parquet"), compression);
            write(&place.join("test-00001-of-00002.parquet"), compression);
            let data = DataSet::read(folder.path(), Task::ArcEasy).unwrap();
            assert_eq!(data.files.len(), 2);
            let rows: Vec<_> = data.documents.iter().map(|row| json!(row.fields)).collect();
            let first = json!({"question": "q é", "choices": {"text": ["a", "b"]}, "label": 1});
            let second = json!({"question": null, "choices": {"text": []}, "label": null});
            assert_eq!(rows, [first.clone(), second.clone(), first, second]);
        }
    }

    #[test]
    fn damaged_files_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("piqa.parquet");
        write(&path, Compression::UNCOMPRESSED);
        let bytes = std::fs::read(&path).unwrap();
        let mut refused = 0;
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x55;
            std::fs::write(&path, changed).unwrap();
            let mut rows = Vec::new();
            refused += usize::from(read_rows(&path, 0, &mut rows).is_err());
        }
        assert!(refused > bytes.len() / 4, "{refused} of {}", bytes.len());
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        let error = read_rows(&path, 0, &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("not a readable Parquet file"));
    }
}

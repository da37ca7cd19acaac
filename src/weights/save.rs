//! Writing.

use super::atomic::write_atomically;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

/// The elements of a tensor to be written.
#[derive(Clone, Debug)]
pub enum Data<'a> {
    /// Floating point.
    F32(Cow<'a, [f32]>),
    /// Integers.
    I64(Cow<'a, [i64]>),
    /// Bytes.
    U8(Cow<'a, [u8]>),
}

impl Data<'_> {
    fn dtype(&self) -> &'static str {
        match self {
            Data::F32(_) => "F32",
            Data::I64(_) => "I64",
            Data::U8(_) => "U8",
        }
    }

    /// Elements and bytes.
    fn len(&self) -> (usize, usize) {
        match self {
            Data::F32(x) => (x.len(), size_of_val(&x[..])),
            Data::I64(x) => (x.len(), size_of_val(&x[..])),
            Data::U8(x) => (x.len(), x.len()),
        }
    }

    fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        // The format is little-endian whatever the machine.
        match self {
            Data::U8(x) => out.write_all(x),
            Data::F32(x) if cfg!(target_endian = "little") => out.write_all(bytemuck::cast_slice(x)),
            Data::I64(x) if cfg!(target_endian = "little") => out.write_all(bytemuck::cast_slice(x)),
            Data::F32(x) => x.iter().try_for_each(|x| out.write_all(&x.to_le_bytes())),
            Data::I64(x) => x.iter().try_for_each(|x| out.write_all(&x.to_le_bytes())),
        }
    }
}

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct NamedTensor<'a> {
    /// Its name.
    pub name: String,
    /// Extents, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// As many elements as the extents say.
    pub data: Data<'a>,
}

/// Writes a safetensors file, whole or not at all. The same tensors and metadata give the same bytes.
pub fn save(path: &Path, tensors: &[NamedTensor], metadata: &BTreeMap<String, String>) -> Result<()> {
    // Wider types first, so that every tensor is aligned to its elements; then by name.
    let mut order: Vec<&NamedTensor> = tensors.iter().collect();
    let width = |t: &NamedTensor| match t.data {
        Data::I64(_) => 8,
        Data::F32(_) => 4,
        Data::U8(_) => 1,
    };
    order.sort_by(|a, b| width(b).cmp(&width(a)).then_with(|| a.name.cmp(&b.name)));
    let header = header(path, &order, metadata)?;
    write_atomically(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        order.iter().try_for_each(|tensor| tensor.data.write(out))
    })
}

/// The JSON before the tensors, padded so that they begin at a multiple of eight.
fn header(path: &Path, order: &[&NamedTensor], metadata: &BTreeMap<String, String>) -> Result<String> {
    let mut fields = Map::new();
    if !metadata.is_empty() {
        fields.insert("__metadata__".into(), json!(metadata));
    }
    let mut offset = 0;
    for tensor in order {
        let (elements, bytes) = tensor.data.len();
        if elements != tensor.shape.iter().product::<usize>() {
            let problem = format!("{}: {elements} elements do not make {:?}", tensor.name, tensor.shape);
            return Err(Error::file(path, problem, "give each tensor the shape of its data"));
        }
        let entry = json!({
            "dtype": tensor.data.dtype(), "shape": tensor.shape, "data_offsets": [offset, offset + bytes],
        });
        if fields.insert(tensor.name.clone(), entry).is_some() {
            let problem = format!("two tensors are named {}", tensor.name);
            return Err(Error::file(path, problem, "give each tensor a name of its own"));
        }
        offset += bytes;
    }
    let mut text = Value::Object(fields).to_string();
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    Ok(text)
}

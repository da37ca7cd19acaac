//! Reading.

use crate::error::{Error, Result};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// What users can do about a file that is no safetensors.
const HINT: &str = "download or save it again as safetensors";

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Its name, without a prefix that all names share (see [`WeightsFile::open`]).
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Extents, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Length in bytes.
    pub bytes: usize,
    /// Where in the file its elements lie.
    range: Range<usize>,
}

/// An open safetensors file, mapped into memory: opening costs its header, reading a tensor costs that tensor.
pub struct WeightsFile {
    path: PathBuf,
    map: Mmap,
    /// Sorted by name.
    entries: Vec<Entry>,
    metadata: BTreeMap<String, String>,
}

impl WeightsFile {
    /// Maps and checks the file: every tensor lies within it, none overlap, sizes fit shapes. Where all names begin with
    /// `module.` or `model.`, as wrappers such as `DataParallel` leave them, that is taken off.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let metadata = file.metadata().map_err(Error::io("read", path))?;
        if metadata.is_dir() {
            return Err(Error::file(path, "is a folder", "give a .safetensors file"));
        }
        if metadata.len() < 8 {
            return Err(Error::file(path, format!("{} bytes are no safetensors file", metadata.len()), HINT));
        }
        // SAFETY: the mapping is read-only and private to this value. Should another process shorten the file meanwhile, the
        // system ends this one with SIGBUS; it cannot make it read anything else. hone itself replaces files by renaming.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        let (header, parsed) =
            SafeTensors::read_metadata(&map).map_err(|error| Error::file(path, explain(&map, &error), HINT))?;
        let start = size_of::<u64>() + header;
        let mut entries: Vec<Entry> = parsed
            .tensors()
            .into_iter()
            .map(|(name, info)| {
                let range = start + info.data_offsets.0..start + info.data_offsets.1;
                Entry { name, dtype: info.dtype, shape: info.shape.clone(), bytes: range.len(), range }
            })
            .collect();
        strip_prefix(&mut entries);
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        let metadata = parsed.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
        Ok(WeightsFile { path: path.to_path_buf(), map, entries, metadata })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All tensors, sorted by name.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&Entry> {
        let i = self.entries.binary_search_by(|entry| entry.name.as_str().cmp(name)).ok()?;
        Some(&self.entries[i])
    }

    /// The free-form strings of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    fn require(&self, name: &str) -> Result<(&Entry, &[u8])> {
        match self.get(name) {
            Some(entry) => Ok((entry, &self.map[entry.range.clone()])),
            None => Err(Error::file(&self.path, format!("it holds no tensor named {name}"), "use another file")),
        }
    }

    fn wrong_type(&self, entry: &Entry, expected: &str) -> Error {
        let problem = format!("{} is {}, expected {expected}", entry.name, entry.dtype);
        Error::file(&self.path, problem, "convert it, or use another file")
    }

    /// The elements of a tensor of F32, F16, BF16 or F64, as f32.
    pub fn f32(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.f32_in_place(name)?.into_owned())
    }

    /// The same, from the mapped file itself where that is possible.
    pub fn f32_in_place(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        let (entry, bytes) = self.require(name)?;
        // Elements are copied out piece by piece where they are not aligned in the file; nothing says that they are.
        Ok(Cow::Owned(match entry.dtype {
            Dtype::F32 => match bytemuck::try_cast_slice(bytes) {
                Ok(values) if cfg!(target_endian = "little") => return Ok(Cow::Borrowed(values)),
                _ => elements(bytes, f32::from_le_bytes),
            },
            Dtype::F64 => elements(bytes, |b| f64::from_le_bytes(b) as f32),
            Dtype::F16 => halves(&elements(bytes, f16::from_le_bytes)),
            Dtype::BF16 => halves(&elements(bytes, bf16::from_le_bytes)),
            _ => return Err(self.wrong_type(entry, "F32, F16, BF16 or F64")),
        }))
    }

    /// The elements of a tensor of integers, as i64.
    pub fn i64(&self, name: &str) -> Result<Vec<i64>> {
        let (entry, bytes) = self.require(name)?;
        Ok(match entry.dtype {
            Dtype::I64 => elements(bytes, i64::from_le_bytes),
            Dtype::I32 => elements(bytes, |b| i64::from(i32::from_le_bytes(b))),
            Dtype::U8 => bytes.iter().map(|&b| i64::from(b)).collect(),
            _ => return Err(self.wrong_type(entry, "I64, I32 or U8")),
        })
    }

    /// The elements of a tensor of U8.
    pub fn u8(&self, name: &str) -> Result<&[u8]> {
        match self.require(name)? {
            (Entry { dtype: Dtype::U8, .. }, bytes) => Ok(bytes),
            (entry, _) => Err(self.wrong_type(entry, "U8")),
        }
    }
}

fn elements<const N: usize, T>(bytes: &[u8], read: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|chunk| read(*chunk)).collect()
}

fn halves<T>(values: &[T]) -> Vec<f32>
where
    [T]: HalfFloatSliceExt,
{
    let mut out = vec![0.0; values.len()];
    values.convert_to_f32_slice(&mut out);
    out
}

/// Takes off a wrapper's prefix if every name has it.
fn strip_prefix(entries: &mut [Entry]) {
    for prefix in ["module.", "model."] {
        if !entries.is_empty() && entries.iter().all(|entry| entry.name.starts_with(prefix)) {
            entries.iter_mut().for_each(|entry| entry.name.drain(..prefix.len()).for_each(drop));
        }
    }
}

/// What is wrong with a file that did not parse: what it looks like rather than what the parser stumbled on.
fn explain(bytes: &[u8], error: &SafeTensorError) -> String {
    let starts = |magic: &[u8]| bytes.starts_with(magic);
    if starts(b"PK\x03\x04") || starts(b"\x80\x02") || starts(b"\x80\x04") {
        return "a PyTorch pickle, not safetensors (convert it with safetensors.torch.save_file in Python)".into();
    }
    if starts(b"version https://git-lfs") {
        return "a git-lfs pointer, not the weights themselves (run `git lfs pull`)".into();
    }
    if starts(b"<!") || starts(b"<htm") || starts(b"<HTM") {
        return "a web page, not safetensors".into();
    }
    match error {
        SafeTensorError::MetadataIncompleteBuffer => {
            "its length does not fit its header: it is truncated, or has bytes that no tensor owns".into()
        }
        SafeTensorError::InvalidHeaderLength | SafeTensorError::HeaderTooLarge => {
            "no safetensors file, or a truncated one: the header is longer than the file".into()
        }
        error => format!("no valid safetensors file ({error})"),
    }
}

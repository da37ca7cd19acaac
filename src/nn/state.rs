//! The network's tensors under torchvision's names and in its layouts, to and from files.

use super::parameter::Parameter;
use super::resnet::{FEATURES, ResNet18, Stage};
use crate::error::{Error, Result};
use crate::tensor::{Device, Tensor, layout};
use crate::weights::{Data, Expected, Kind, NamedTensor, WeightsFile, check};
use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

/// A place in the network that a file's tensor goes to.
enum Slot<'a> {
    Values(&'a Parameter),
    Count(&'a AtomicI64),
}

/// The values of the network at one moment. Taking one copies nothing; what is trained on is copied when it changes.
pub struct Snapshot(Vec<(String, SnapshotValue)>);

enum SnapshotValue {
    Values(Tensor),
    Count(i64),
}

/// Extents as torchvision has them: filters are `[O, I, KH, KW]`.
fn file_shape(shape: &[usize]) -> Vec<usize> {
    match *shape {
        [o, kh, kw, i] => vec![o, i, kh, kw],
        _ => shape.to_vec(),
    }
}

impl ResNet18 {
    fn slots(&self) -> Vec<(String, Slot<'_>)> {
        let mut slots = Vec::new();
        for stage in Stage::ALL {
            for conv in self.convolutions(stage) {
                let bn = &conv.bn;
                let values = [&conv.weight, &bn.weight, &bn.bias, &bn.running_mean, &bn.running_var];
                slots.extend(values.map(|p: &Arc<Parameter>| (p.name().to_string(), Slot::Values(p))));
                slots.push((format!("{}.num_batches_tracked", bn.name()), Slot::Count(&bn.num_batches_tracked)));
            }
        }
        let head = [&self.head().weight, &self.head().bias];
        slots.extend(head.map(|p| (p.name().to_string(), Slot::Values(p))));
        slots
    }

    /// Number of classes of the head in `file`, if it has one of the right width.
    pub fn classes_in(file: &WeightsFile) -> Option<usize> {
        match file.get("fc.weight")?.shape[..] {
            [classes, FEATURES] => Some(classes),
            _ => None,
        }
    }

    /// The network of `file`, with its head.
    pub fn load(file: &WeightsFile) -> Result<Self> {
        let classes = Self::classes_in(file).unwrap_or(1);
        if classes == 0 {
            return Err(Error::file(file.path(), "fc.weight has no rows", "give a model of a class at least"));
        }
        let network = ResNet18::without_values(classes, 0);
        network.load_slots(file, &[])?;
        Ok(network)
    }

    /// The backbone of `file` with a new head for `classes`, drawn by `seed`.
    pub fn load_backbone(file: &WeightsFile, classes: usize, seed: u64) -> Result<Self> {
        let network = ResNet18::without_values(classes, seed);
        network.load_slots(file, &["fc.weight", "fc.bias"])?;
        Ok(network)
    }

    /// Fills every slot but those of `without` from `file`, or fails with one error that lists all that does not fit.
    fn load_slots(&self, file: &WeightsFile, without: &[&str]) -> Result<()> {
        let slots = self.slots();
        let wanted = slots.iter().filter(|(name, _)| !without.contains(&name.as_str()));
        let shapes: Vec<Vec<usize>> = wanted
            .clone()
            .map(|(_, slot)| match slot {
                Slot::Values(parameter) => file_shape(parameter.shape()),
                Slot::Count(_) => Vec::new(),
            })
            .collect();
        let expected: Vec<Expected> = wanted
            .clone()
            .zip(&shapes)
            .map(|((name, slot), shape)| Expected {
                name,
                shape,
                kind: if matches!(slot, Slot::Count(_)) { Kind::Integer } else { Kind::Float },
                // Checkpoints from before PyTorch 0.4.1 do not count batches.
                optional: matches!(slot, Slot::Count(_)),
            })
            .collect();
        check(file, &expected, without).into_result(file.path())?;
        for ((name, slot), shape) in wanted.zip(&shapes) {
            match slot {
                Slot::Values(parameter) => parameter.set(read_values(file, name, shape)?)?,
                Slot::Count(count) if file.get(name).is_some() => {
                    count.store(file.i64(name)?.first().copied().unwrap_or(0), Ordering::Relaxed);
                }
                Slot::Count(_) => {}
            }
        }
        Ok(())
    }

    /// The values as of now.
    pub fn snapshot(&self) -> Snapshot {
        let value = |slot: Slot| match slot {
            Slot::Values(parameter) => SnapshotValue::Values(parameter.tensor().detach()),
            Slot::Count(count) => SnapshotValue::Count(count.load(Ordering::Relaxed)),
        };
        Snapshot(self.slots().into_iter().map(|(name, slot)| (name, value(slot))).collect())
    }
}

impl ResNet18 {
    /// Puts back the values of a file that holds the tensors of [`Snapshot::tensors`] under names that begin with `prefix`.
    pub fn restore(&self, file: &WeightsFile, prefix: &str) -> Result<()> {
        for (name, slot) in self.slots() {
            let name = format!("{prefix}{name}");
            match slot {
                Slot::Values(parameter) => {
                    parameter.set(read_values(file, &name, &file_shape(parameter.shape()))?)?;
                }
                Slot::Count(count) => count.store(file.i64(&name)?.first().copied().unwrap_or(0), Ordering::Relaxed),
            }
        }
        Ok(())
    }
}

/// A tensor of the file in hone's layout; `shape` is the file's.
fn read_values(file: &WeightsFile, name: &str, shape: &[usize]) -> Result<Tensor> {
    let values = file.f32_in_place(name)?;
    match shape.len() {
        4 => layout::from_channels_first(&values, shape),
        _ => Tensor::from_slice::<f32>(&values, shape),
    }
}

impl Snapshot {
    /// The tensors for a file that torchvision's `load_state_dict` takes.
    pub fn tensors(&self) -> Result<Vec<NamedTensor<'_>>> {
        self.0
            .iter()
            .map(|(name, value)| {
                let (shape, data) = match value {
                    SnapshotValue::Count(count) => (Vec::new(), Data::I64(Cow::Owned(vec![*count]))),
                    SnapshotValue::Values(tensor) if tensor.dims().len() == 4 => {
                        let (values, shape) = layout::to_channels_first(&tensor.to_device(Device::Cpu)?)?;
                        (shape, Data::F32(Cow::Owned(values)))
                    }
                    SnapshotValue::Values(tensor) => {
                        (tensor.dims().to_vec(), Data::F32(Cow::Owned(tensor.to_f32_vec()?)))
                    }
                };
                Ok(NamedTensor { name: name.clone(), shape, data })
            })
            .collect()
    }
}

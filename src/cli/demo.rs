//! `hone demo`: the whole job on pictures that the program draws.

use super::args::Demo;
use super::report::{self, Report};
use super::train::{done, summary, today};
use super::using::prediction_line;
use crate::data::demo::write_pictures;
use crate::data::expand_inputs;
use crate::error::{Error, Result};
use crate::train::{Control, Model, Outcome, Placement, TrainConfig, Weights, default_run_folder, fit, predict};
use crate::weights::locate_default;
use std::path::Path;

/// Pictures of each class to train and to validate with.
const PICTURES: [usize; 2] = [60, 20];
/// Side of the pictures in pixels; the crop is what the bundled weights see best at.
const PICTURE_SIZE: u32 = 160;
const IMAGE_SIZE: u32 = 128;
const EPOCHS: usize = 8;

pub fn run(args: Demo) -> Result<()> {
    let weights = Weights::File(locate_default(std::env::var_os("HONE_WEIGHTS"))?);
    let out = args.out.unwrap_or_else(|| default_run_folder(Path::new("demo"), &today()));
    let (json, placement) = (args.common.json, args.common.placement()?);
    let say = |text: &str| {
        if !json {
            report::line(text)
        }
    };
    let pictures = out.join("pictures");
    write_pictures(&pictures, PICTURES[0], PICTURES[1], PICTURE_SIZE, 0)?;
    say(&format!("drew pictures of four textures: {}", pictures.display()));
    let train = |weights: Weights, folder: &str, report: &mut Report| -> Result<Outcome> {
        let config = TrainConfig {
            epochs: EPOCHS,
            image_size: IMAGE_SIZE,
            precision: placement.precision,
            ..TrainConfig::new(pictures.clone(), weights)
        };
        fit(&config, &out.join(folder), Control { device: placement.device, ..Control::default() }, report)
    };
    let tuned = train(weights, "model", &mut Report::new(json))?;
    if json {
        report::json_line(&done(&tuned));
        return Ok(());
    }
    say(&summary(&tuned));
    say("the same on an untrained backbone:");
    let untrained = train(Weights::Random, "untrained", &mut Report::new(false))?;
    say(&summary(&untrained));
    show_predictions(&tuned.model, &pictures.join("val"), placement)?;
    say(&format!("model, metrics and settings: {}", tuned.model.parent().unwrap_or(&out).display()));
    say(&format!("try: hone predict {} PICTURE", tuned.model.display()));
    Ok(())
}

/// What the model takes the first validation picture of each class for.
fn show_predictions(model: &Path, val: &Path, placement: Placement) -> Result<()> {
    let model = Model::load_on(model, placement)?;
    let mut firsts = Vec::new();
    for class in &model.classes {
        let pictures = expand_inputs(&[val.join(class)])?;
        firsts.extend(pictures.into_iter().take(1));
    }
    if firsts.is_empty() {
        return Err(Error::data(val, "no pictures", "run the demo again in another folder"));
    }
    for prediction in predict(&model, firsts, 2, &mut Report::new(false))? {
        report::line(&prediction_line(&model.classes, &prediction));
    }
    Ok(())
}

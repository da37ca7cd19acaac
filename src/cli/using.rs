//! `hone eval` and `hone predict`.

use super::args::{Eval, Predict};
use super::report::{self, Report};
use crate::data::{expand_inputs, open_evaluation};
use crate::error::Result;
use crate::train::{self, Confusion, Model, Prediction};
use serde_json::json;

/// A table wider than this is of no use on a screen.
const MAX_TABLE: usize = 24;

pub fn eval(args: Eval) -> Result<()> {
    let model = Model::load(&args.model)?;
    let samples = open_evaluation(&args.data, &model.classes)?;
    let result = train::evaluate(&model, samples, &mut Report::new(args.common.json))?;
    if args.common.json {
        report::json_line(&json!({
            "accuracy": result.accuracy,
            "loss": result.loss,
            "images": result.images,
            "classes": model.classes,
            "confusion": result.confusion.counts,
            "skipped": result.skipped.iter().map(|s| s.file.to_string_lossy()).collect::<Vec<_>>(),
        }));
        return Ok(());
    }
    let skipped = match result.skipped.len() {
        0 => String::new(),
        n => format!(", {n} skipped"),
    };
    report::line(&format!(
        "accuracy {:.4}, loss {:.4} on {} pictures{skipped}",
        result.accuracy, result.loss, result.images
    ));
    if model.classes.len() <= MAX_TABLE {
        confusion_table(&model.classes, &result.confusion).iter().for_each(|line| report::line(line));
    }
    Ok(())
}

/// Rows are true classes, columns what they were taken for.
fn confusion_table(classes: &[String], confusion: &Confusion) -> Vec<String> {
    let name = classes.iter().map(|c| c.chars().count()).max().unwrap_or(0).max("true".len());
    let columns: Vec<usize> = classes.iter().map(|c| c.chars().count().max(5)).collect();
    let header = classes.iter().zip(&columns).map(|(class, width)| format!("  {class:>width$}")).collect::<String>();
    let mut lines = vec![format!("{:<name$}{header}", "true")];
    for (class, row) in classes.iter().zip(&confusion.counts) {
        let cells = row.iter().zip(&columns).map(|(count, width)| format!("  {count:>width$}")).collect::<String>();
        lines.push(format!("{class:<name$}{cells}"));
    }
    lines
}

pub fn predict(args: Predict) -> Result<()> {
    let model = Model::load(&args.model)?;
    let paths = expand_inputs(&args.paths)?;
    let top = args.top as usize;
    let predictions = train::predict(&model, paths, top, &mut Report::new(args.common.json))?;
    for prediction in &predictions {
        if args.common.json {
            report::json_line(&json!({
                "file": prediction.file.to_string_lossy(),
                "predictions": prediction.classes.iter().map(|&(class, probability)| {
                    json!({ "class": model.classes[class], "probability": probability })
                }).collect::<Vec<_>>(),
            }));
        } else {
            report::line(&prediction_line(&model.classes, prediction));
        }
    }
    Ok(())
}

pub fn prediction_line(classes: &[String], prediction: &Prediction) -> String {
    let ranked = prediction.classes.iter().map(|&(class, p)| format!("{} {:.1} %", classes[class], p * 100.0));
    format!("{}: {}", prediction.file.display(), ranked.collect::<Vec<_>>().join(", "))
}

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
    let model = Model::load_on(&args.model, args.common.placement()?)?;
    let samples = open_evaluation(&args.data, &model.classes)?;
    let result = train::evaluate(&model, samples, &mut Report::new(args.common.json))?;
    if args.common.json {
        report::json_line(&json!({
            "accuracy": result.accuracy,
            "loss": result.loss,
            "images": result.images,
            "classes": model.classes,
            "confusion": result.confusion.counts,
            "top5_accuracy": result.confusion.top5_accuracy(),
            "per_class": result.confusion.class_metrics(),
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
    class_table(&model.classes, &result.confusion).iter().for_each(|line| report::line(line));
    Ok(())
}

/// Precision, recall and F1 of every class; what was taken for what, where that fits a screen; top-5 accuracy.
pub fn class_table(classes: &[String], confusion: &Confusion) -> Vec<String> {
    let name = classes.iter().map(|c| c.chars().count()).max().unwrap_or(0).max("class".len());
    let share = |x: Option<f64>| x.map_or("-".to_string(), |x| format!("{x:.4}"));
    let mut lines = vec![format!("{:<name$}  precision  recall      f1  pictures", "class")];
    for (class, m) in classes.iter().zip(confusion.class_metrics()) {
        let (precision, recall, f1) = (share(m.precision), share(m.recall), share(m.f1));
        lines.push(format!("{class:<name$}  {precision:>9}  {recall:>6}  {f1:>6}  {:>8}", m.support));
    }
    if classes.len() <= MAX_TABLE {
        lines.extend(confusion_table(classes, confusion));
    }
    lines.extend(confusion.top5_accuracy().map(|top5| format!("top-5 accuracy {top5:.4}")));
    lines
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
    let model = Model::load_on(&args.model, args.common.placement()?)?;
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

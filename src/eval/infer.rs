//! A published checkpoint says nothing of its model but the names and shapes of its tensors; this
//! reads the rest off them.

use crate::{
    Error, Result,
    data::torch::StateDict,
    model::{Config, Fusion, ModelName},
};

/// The model of these tensors. The number of attention heads leaves no trace in them, so it is
/// given. Dropout rates are the published ones; they do nothing in an evaluation.
pub fn config(tensors: &StateDict, heads: usize) -> Result<Config> {
    let shape = |name: &str, rank: &str, ranks: &[usize]| match tensors.get(name).map(|parameter| &parameter.shape) {
        Some(shape) if ranks.contains(&shape.len()) => Ok(shape.as_slice()),
        Some(shape) => Err(Error::Usage(format!("tensor `{name}` has shape {shape:?}, expected {rank}"))),
        None => Err(Error::Usage(format!("there is no tensor `{name}`, so this is not a CrossFusion checkpoint"))),
    };
    let dim = shape("cls_token", "[1, 1, dim]", &[3])?[2];
    // what only one of the models has, and what its projection and its transformer of the source
    // are called
    let has = |name: &str| tensors.contains_key(name);
    let (model, projection, transformer) = if has("pre_final_linear.0.weight") {
        (ModelName::CrossFusionConcat, "source_pre_cross_attn", "source_transformer")
    } else if has("source_ln.weight") {
        (ModelName::CrossFusionSingle, "source_pre_cross_attn", "source_transformer")
    } else {
        (ModelName::CrossFusion, "s_lin_proj", "s_transformer")
    };
    let projection = format!("{projection}.0.weight");
    let features = match has(&projection) {
        true => shape(&projection, "[dim, features]", &[2])?[1],
        false => dim, // features as wide as the model are not projected
    };
    let convolution = "conv_processor.conv_block.0.proj.weight";
    let fusion = match model {
        ModelName::CrossFusionConcat => Fusion::Conv2d,
        _ => match shape(convolution, "[dim / 2, 2, 7, 7] or [dim / 2, 2, 7]", &[3, 4])?.len() {
            4 => Fusion::Conv2d,
            _ => Fusion::Conv1d,
        },
    };
    let layers = (0..).take_while(|i| has(&format!("{transformer}.pre_layers.layers.{i}.0.weight"))).count();
    let n_classes = shape("mlp_head.0.weight", "[n_classes, dim]", &[2])?[0];
    let config = Config { model, dim, heads, layers, n_classes, fusion, ..Config::new(features) };
    config.check()?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{data::torch::Parameter, model::Model};

    fn tensors(config: &Config) -> StateDict {
        let model = Model::new(config).unwrap();
        model
            .layout()
            .entries()
            .iter()
            .map(|entry| (entry.name.clone(), Parameter { shape: entry.shape.clone(), values: Vec::new() }))
            .collect()
    }

    #[test]
    fn a_models_tensors_tell_its_config() {
        let small = Config { dim: 64, heads: 2, ..Config::new(24) };
        let configs = [
            Config::new(2048),
            Config::new(512), // no projection
            small.clone(),
            Config { layers: 3, n_classes: 1, fusion: Fusion::Conv1d, ..small },
        ];
        for expected in
            configs.into_iter().flat_map(|config| ModelName::ALL.map(|model| Config { model, ..config.clone() }))
        {
            if expected.check().is_ok() {
                assert_eq!(config(&tensors(&expected), expected.heads).unwrap(), expected);
            }
        }
    }

    #[test]
    fn other_tensors_are_refused_by_name() {
        let mut tensors = tensors(&Config { dim: 64, ..Config::new(24) });
        tensors.insert("cls_token".into(), Parameter { shape: vec![64], values: Vec::new() });
        let error = config(&tensors, 4).unwrap_err().to_string();
        assert!(error.contains("`cls_token` has shape [64]"), "{error}");
        tensors.remove("cls_token");
        let error = config(&tensors, 4).unwrap_err().to_string();
        assert!(error.contains("no tensor `cls_token`"), "{error}");
    }
}

//! The models, and all that the rest of the program knows of one.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{
    BagGrads, Bags, Config, Context, CrossFusion, CrossFusionConcat, CrossFusionSingle, Layout, Scale, Scales,
};
use crate::{Result, device::Element, ops::head::HeadGrad};

/// A model, as the engine, the plans, checkpoints and evaluations know it: from a slide's bags to
/// the one row that the head reads, and back.
pub(crate) trait Network {
    /// What backward needs of a forward pass; its views lie on the arena's saved stack.
    type Saved<'a, T: Element>;

    /// The scales that it reads.
    const SCALES: &'static [Scale];
    /// Those of them that come part by part where a policy streams.
    const STREAMED: &'static [Scale];

    fn config(&self) -> &Config;

    /// Its parameters.
    fn layout(&self) -> &Layout;

    /// From the bags to the head's input, and all that backward needs.
    fn forward<'a, T: Element>(&self, ctx: &mut Context, bags: Bags<'a, T>) -> Result<Self::Saved<'a, T>>;

    /// The head on top of a forward pass, and where its gradients go.
    fn head<T: Element>(&self, saved: &Self::Saved<'_, T>) -> HeadGrad<T>;

    /// After the head's backward pass: adds the parameters' gradients of one slide to `ctx.grads`.
    /// `dbags` receives the bags' gradients, which training does not need.
    fn backward<T: Element>(
        &self,
        ctx: &mut Context,
        saved: Self::Saved<'_, T>,
        dbags: Option<&BagGrads<'_, T>>,
    ) -> Result<()>;

    /// After a forward pass that was for training, in place of backward: the attention that each
    /// patch receives, at the scales that are attended to. An error that says so where the model
    /// has no such attention.
    fn attention<T: Element>(
        &self,
        ctx: &mut Context,
        saved: Self::Saved<'_, T>,
        of: AttentionOf,
    ) -> Result<Scales<Vec<f64>>>;
}

/// Whose attention is asked for, each averaged over the heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionOf {
    /// The x10 patches', to x5 and to x20 by cross-attention: the mean over them. It sums to 1 over
    /// the patches of a scale.
    Patches,
    /// The class token's in the last layer, to the x10 tokens; and through these, by
    /// cross-attention, to x5 and x20 (attention rollout over two layers, Abnar & Zuidema 2020). It
    /// sums, over the patches of a scale, to what the class token does not give to itself.
    ClassToken,
}

/// Which model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ModelName {
    /// As published: x5, x10 and x20, fused by convolution.
    #[default]
    #[serde(rename = "crossfusion")]
    CrossFusion,
    /// Ablation: the streams are put side by side and projected instead of convolved.
    #[serde(rename = "crossfusion-concat")]
    CrossFusionConcat,
    /// Ablation: x20 alone.
    #[serde(rename = "crossfusion-single")]
    CrossFusionSingle,
}

impl ModelName {
    /// All models.
    pub const ALL: [Self; 3] = [Self::CrossFusion, Self::CrossFusionConcat, Self::CrossFusionSingle];

    /// The scales that the model reads.
    pub fn scales(self) -> &'static [Scale] {
        match self {
            Self::CrossFusion => CrossFusion::SCALES,
            Self::CrossFusionConcat => CrossFusionConcat::SCALES,
            Self::CrossFusionSingle => CrossFusionSingle::SCALES,
        }
    }

    /// Those of them that come part by part where a policy streams.
    pub fn streamed(self) -> &'static [Scale] {
        match self {
            Self::CrossFusion => CrossFusion::STREAMED,
            Self::CrossFusionConcat => CrossFusionConcat::STREAMED,
            Self::CrossFusionSingle => CrossFusionSingle::STREAMED,
        }
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::CrossFusion => "crossfusion",
            Self::CrossFusionConcat => "crossfusion-concat",
            Self::CrossFusionSingle => "crossfusion-single",
        })
    }
}

/// One of the models.
#[expect(clippy::large_enum_variant, reason = "an engine has one, and it is not moved")]
pub enum Model {
    /// As published: x5, x10 and x20, fused by convolution.
    CrossFusion(CrossFusion),
    /// Ablation: the streams are put side by side and projected instead of convolved.
    CrossFusionConcat(CrossFusionConcat),
    /// Ablation: x20 alone.
    CrossFusionSingle(CrossFusionSingle),
}

/// Evaluates an expression of whichever model it is.
macro_rules! each {
    ($model:expr, $network:ident => $work:expr) => {
        match $model {
            $crate::model::Model::CrossFusion($network) => $work,
            $crate::model::Model::CrossFusionConcat($network) => $work,
            $crate::model::Model::CrossFusionSingle($network) => $work,
        }
    };
}
pub(crate) use each;

impl Model {
    /// An error if no model can be built from these settings.
    pub fn new(config: &Config) -> Result<Self> {
        config.check()?;
        Ok(match config.model {
            ModelName::CrossFusion => Self::CrossFusion(CrossFusion::new(config)),
            ModelName::CrossFusionConcat => Self::CrossFusionConcat(CrossFusionConcat::new(config)),
            ModelName::CrossFusionSingle => Self::CrossFusionSingle(CrossFusionSingle::new(config)),
        })
    }

    /// The settings that it was built from.
    pub fn config(&self) -> &Config {
        each!(self, network => network.config())
    }

    /// Its parameters.
    pub fn layout(&self) -> &Layout {
        each!(self, network => network.layout())
    }

    /// The scales that it reads.
    pub fn scales(&self) -> &'static [Scale] {
        self.config().model.scales()
    }

    /// Those of them that come part by part where a policy streams.
    pub fn streamed(&self) -> &'static [Scale] {
        self.config().model.streamed()
    }
}

#!/usr/bin/env bash
# The whole way, from slides to heatmaps, with cf-slide and cf-train on the path:
#   scripts/whole-way.sh SLIDES BACKBONE.onnx OUT [flags of cf-slide patch: --preset tcga, say]
# SLIDES is a folder of slides. What OUT holds is not done again. OUT/clinical.csv and OUT/splits
# are trained on by the settings in OUT/train.toml, or the published ones. Where they are not there,
# outcomes, folds and a small model are invented, to see every program at work.
set -euo pipefail

if [ $# -lt 3 ]; then
  sed -n '2,6s/^# //p' "$0" >&2
  exit 2
fi
slides=$1 onnx=$2 out=$3
shift 3
backbone=$(basename "$onnx" .onnx)
mkdir -p "$out"

# a slide that cannot be read is named, and the others go on
cf-slide patch "$slides" --out "$out/patches" "$@" || [ $? = 1 ]
cf-slide embed "$out/patches" --backbone "$onnx" --out "$out/features" || [ $? = 1 ]

# the files that cf-slide patch takes for slides, in a folder of folders too; beside them may lie a
# slide's annotations or pictures under its name
named=()
for ending in svs tif tiff ndpi mrxs scn vms vmu svslide bif czi; do
  named+=(-o -iname "*.$ending")
done
ids=() files=()
while IFS= read -r -d '' file; do
  id=$(basename "${file%.*}")
  if [ -f "$out/features/$backbone/x5/pt_files/$id.pt" ]; then
    ids+=("$id") files+=("$file")
  fi
done < <(find -L "$slides" -type f \( "${named[@]:1}" \) -print0 | LC_ALL=C sort -z)
if [ ${#ids[@]} -lt 2 ]; then
  echo "whole-way.sh: $slides: training needs two slides with patches, found ${#ids[@]}" >&2
  exit 1
fi

if ! [ -e "$out/clinical.csv" ]; then
  echo "no $out/clinical.csv: outcomes, folds and a small model are invented, and mean nothing"
  quoted() { printf '"%s"' "${1//\"/\"\"}"; }
  mkdir -p "$out/splits"
  echo case_id,slide_id,censorship,survival_months >"$out/clinical.csv.part"
  echo case_id,split >"$out/splits/splits_0.csv"
  echo case_id,split >"$out/splits/splits_1.csv"
  sides=(train val)
  for i in "${!ids[@]}"; do
    id=$(quoted "${ids[i]}")
    echo "$id,$id,0,$((12 * (i + 1)))" >>"$out/clinical.csv.part"
    echo "$id,${sides[i % 2]}" >>"$out/splits/splits_0.csv"
    echo "$id,${sides[(i + 1) % 2]}" >>"$out/splits/splits_1.csv"
  done
  # an update a slide
  [ -e "$out/train.toml" ] ||
    printf '%s\n' 'embed_dim = 64' 'n_classes = 2' 'grad_accum_steps = 1' 'num_epochs = 20' \
      'warmup_epochs = 0' >"$out/train.toml"
  # last, for its being there says that the others are
  mv "$out/clinical.csv.part" "$out/clinical.csv"
fi
settings=()
[ -e "$out/train.toml" ] && settings=(--config "$out/train.toml")

if [ -e "$out/run/config.toml" ]; then
  cf-train --resume "$out/run"
else
  cf-train ${settings[@]+"${settings[@]}"} --clinical "$out/clinical.csv" --splits "$out/splits" \
    --pt-dir "$out/features" --backbone "$backbone" --out "$out/run"
fi
features=(--pt-dir "$out/features" --backbone "$backbone")
[ -e "$out/predictions/predictions.csv" ] ||
  cf-slide predict "$out/run" "${files[@]}" "${features[@]}" --out "$out/predictions"
for i in "${!ids[@]}"; do
  heatmap=$out/heatmaps/${ids[i]}
  [ -e "$heatmap/heatmap.csv" ] ||
    cf-slide heatmap "$out/run" "${files[i]}" "${features[@]}" --patches "$out/patches" --out "$heatmap"
done
echo "report $out/run/report.html, predictions $out/predictions, heatmaps $out/heatmaps"

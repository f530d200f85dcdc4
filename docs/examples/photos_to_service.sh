#!/usr/bin/env bash
# From folders of photos to a service: photos/<class>/* are learned first, more/<class>/* and lamp/* later.
set -euo pipefail
PORT=${PORT:-8000}

# learn the classes in photos; demo-quick has a small encoder of its own, and quick downloads a ViT-B/16
pgp train demo-quick --data photos --output runs/photos

# learn the classes in more, without the images in photos
pgp add runs/photos more

# serve a page and an HTTP interface; the page is at http://127.0.0.1:8000
pgp serve runs/photos --port "$PORT" &
trap 'kill $!' EXIT
curl --silent --retry 60 --retry-delay 1 --retry-all-errors --output /dev/null "http://127.0.0.1:$PORT/health"

# classify a photo
curl --silent --form files=@photo.jpg "http://127.0.0.1:$PORT/predict?top=2"; echo

# teach the running service one more class, and wait until it is learned
lamps=()
for photo in lamp/*; do lamps+=(--form "files=@\"$photo\""); done
curl --silent --fail --form name=lamp "${lamps[@]}" "http://127.0.0.1:$PORT/teach"; echo
until curl --silent "http://127.0.0.1:$PORT/teach" | grep -q '"state":"finished"'; do sleep 0.2; done
curl --silent "http://127.0.0.1:$PORT/classes"; echo

# write an ONNX model of all that was learned, and use it without pgp
pgp export runs/photos exported --preprocess
python classify.py exported/model.onnx photo.jpg

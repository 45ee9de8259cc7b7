# Runs the commands that come over the virtio-serial port, one at a time. A command is a line
# "MARK SECONDS SCRIPT", the script in base64. What it prints is sent as it comes, and then a
# line "MARK STATUS". Nothing that a command started outlives it: each has process ids of its own.
busybox=/run/nested/busybox
set -- /dev/vport*p1
exec 3<>"$1"
"$PYTHON" -I -S /run/nested/hold.py 3>&- || echo "nested: no KVM"
echo "nested: ready" >&3
while read -r mark seconds script <&3; do
    echo "$script" | $busybox base64 -d >/run/nested/script
    $busybox timeout -s KILL "$seconds" \
        /usr/bin/unshare --pid --fork --kill-child --mount-proc /bin/sh /run/nested/script \
        </dev/null >&3 2>&1 3>&-
    printf '\n%s %d\n' "$mark" $? >&3
done
# The other end has closed.
$busybox poweroff -f


# Names that change with time: of VMs, clusters, templates, images.
_pavo_live() {
    local line="${COMP_LINE:0:COMP_POINT}" words live before=""
    read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    mapfile -t live < <(command "${words[0]/#\~/$HOME}" internal complete -- "${words[@]:1}" 2>/dev/null)
    if ((${#live[@]} == 0)); then
        _pavo "$@"
        return
    fi
    # To readline what stands before a `:` is a word of its own.
    local current="${words[-1]}"
    [[ $current == *:* && $COMP_WORDBREAKS == *:* ]] && before="${current%"${current##*:}"}"
    COMPREPLY=("${live[@]#"$before"}")
    [[ ${live[0]} == *: ]] && compopt -o nospace
}
complete -F _pavo_live -o bashdefault -o default pavo

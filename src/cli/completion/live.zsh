
# Names that change with time: of VMs, clusters, templates, images.
_pavo_live() {
    local -a live
    live=("${(@f)$(command ${~words[1]} internal complete -- "${(@)words[2,CURRENT-1]}" "$PREFIX" 2>/dev/null)}")
    if [[ -z ${live[1]} ]]; then
        _pavo "$@"
    elif [[ ${live[1]} == *: ]]; then
        compadd -Q -S '' -- "${live[@]}"
    else
        compadd -Q -- "${live[@]}"
    fi
}
compdef _pavo_live pavo
